"""The only code that imports Ray. `run.py` tells the story; `ray_train.py` and `local.py` are its two ways to run."""
