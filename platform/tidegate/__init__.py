"""Tidegate: a gated-MoE pretraining lab on Ray."""

__version__ = "0.1.0"
