"""Runnable examples: ``python -m examples.best_of_n --url http://localhost:30000``."""
