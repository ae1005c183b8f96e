"""The demo: ``python -m rksc_sglang.demo``, and the server process that it runs."""
