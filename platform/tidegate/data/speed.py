"""How fast this machine makes tokens of a job's text, and batches of its tokens."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tidegate.data.build import encode, read_corpus
from tidegate.data.config import DataConfig
from tidegate.data.loader import TrainLoader
from tidegate.data.shards import TOKENIZER_FILE, TokenDataset
from tidegate.data.tokenizer import load_tokenizer

__all__ = ["TokenizingSpeed", "loading_speed", "tokenizing_speed"]

_SAMPLE_CHARS = 1_000_000
"""Text of each domain that is encoded."""


class TokenizingSpeed(NamedTuple):
    """Of one core."""

    tokens_per_s: float
    bytes_per_s: float
    """Of UTF-8 text."""
    sample_tokens: int
    """What was encoded, end-of-text tokens included."""
    sample_bytes: int


def tokenizing_speed(dataset: TokenDataset, config: DataConfig, *, job_dir: Path, passes: int = 5) -> TokenizingSpeed:
    """Encode the first training text of every domain on one core; the median over the passes.

    Args:
        dataset: prepared from `config`.
        config: the job's data section.
        job_dir: what `{job}` stands for.
        passes: at least 1.
    """
    texts = [text for domain in range(len(config.domains)) for text in _sample(config, domain, job_dir)]
    built = load_tokenizer((dataset.folder / TOKENIZER_FILE).read_bytes(), str(dataset.folder))
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the Rust side asks at every call
    try:
        seconds, tokens = [], 0
        for _ in range(passes):
            began = time.perf_counter()
            tokens = sum(len(document) for document in encode(built, texts))
            seconds.append(time.perf_counter() - began)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
    num_bytes, median = sum(len(text.encode()) for text in texts), statistics.median(seconds)
    return TokenizingSpeed(tokens / median, num_bytes / median, tokens, num_bytes)


def loading_speed(
    dataset: TokenDataset,
    config: DataConfig,
    *,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    seconds: float = 0.5,
    passes: int = 5,
) -> float:
    """Tokens a second of one rank's batches, read one ahead as in training by a consumer that does nothing else.

    Args:
        dataset: the prepared tokens.
        config, global_batch, micro_batch, world_size: as for `TrainLoader`.
        seconds: of a pass, at least.
        passes: at least 1; the median counts.
    """
    loader = TrainLoader(
        dataset, config, global_batch=global_batch, micro_batch=micro_batch, rank=0, world_size=world_size
    )
    rates = []
    next(loader)  # starts the thread, and draws the first epoch's permutations
    for _ in range(passes):
        tokens, elapsed, began = 0, 0.0, time.perf_counter()
        while elapsed < seconds:
            tokens += next(loader).loss_mask_MBT.numel()
            elapsed = time.perf_counter() - began
        rates.append(tokens / elapsed)
    loader.close()
    return statistics.median(rates)


def _sample(config: DataConfig, domain: int, job_dir: Path) -> Iterator[str]:
    left = _SAMPLE_CHARS
    for text in read_corpus(config, config.domains[domain], job_dir).train:
        if left <= 0:
            return
        yield text
        left -= len(text)
