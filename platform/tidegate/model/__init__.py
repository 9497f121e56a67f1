"""What is trained. Start with `decoder.py`."""
