"""The only code that imports DeepSpeed, and all collectives. `config.py` and `collectives.py` do not need it."""
