"""The training loop and what it needs. Read `loop.py`, then `step.py`."""
