"""Operations of gated attention and mixture-of-experts training, one folder each.

A folder holds the operation (`__init__.py`), its plain PyTorch truth (`reference.py`) and its README with the maths.
Nothing here imports the platform.
"""
