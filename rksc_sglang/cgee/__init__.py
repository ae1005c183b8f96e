"""CGEE, confidence-gated early exit: verification that costs what it must."""
