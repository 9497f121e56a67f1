"""Text to token shards, and token shards to batches in an order that does not depend on the number of ranks.

Names load on first use: a job file can be checked without importing torch, datasets or tokenizers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tidegate.data.config import DataConfig, DomainConfig, TokenizerFile, TrainedTokenizer

if TYPE_CHECKING:
    from tidegate.data.baseline import unigram_perplexity
    from tidegate.data.build import find, prepare
    from tidegate.data.loader import EvalBatch, StepBatch, TrainLoader, eval_batches
    from tidegate.data.shards import TokenDataset, check_tokenizer

__all__ = [
    "DataConfig",
    "DomainConfig",
    "EvalBatch",
    "StepBatch",
    "TokenDataset",
    "TokenizerFile",
    "TrainLoader",
    "TrainedTokenizer",
    "check_tokenizer",
    "eval_batches",
    "find",
    "prepare",
    "unigram_perplexity",
]

_MODULES = {
    "EvalBatch": "loader",
    "StepBatch": "loader",
    "TokenDataset": "shards",
    "TrainLoader": "loader",
    "check_tokenizer": "shards",
    "eval_batches": "loader",
    "find": "build",
    "prepare": "build",
    "unigram_perplexity": "baseline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
