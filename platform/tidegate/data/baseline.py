"""The unigram baseline: what a model scores that knows word frequencies and nothing else."""

from __future__ import annotations

import numpy as np

from tidegate.data.config import DataConfig
from tidegate.data.loader import eval_windows
from tidegate.data.packing import read_windows
from tidegate.data.shards import TokenDataset

__all__ = ["unigram_perplexity"]


def unigram_perplexity(dataset: TokenDataset, config: DataConfig) -> dict[str, float]:
    """Held-out perplexity of an add-one-smoothed unigram model of each domain's own training tokens.

    Scored on exactly the label positions that `eval_batches` scores.

    Args:
        dataset: the prepared tokens.
        config: the job's data section.

    Returns:
        Perplexity (exp of nats per token) by domain name.
    """
    perplexity = {}
    for domain, name in enumerate(dataset.domains):
        counts_V = np.ones(dataset.vocab_size, np.int64)
        for chunk in dataset.stream(domain, "train").chunks():
            counts_V += np.bincount(chunk, minlength=dataset.vocab_size)
        nll_V = np.log(counts_V.sum()) - np.log(counts_V)
        held_out = read_windows(
            dataset,
            [(domain, "held_out", window) for window in range(eval_windows(dataset, config, domain))],
            sequence_length=config.sequence_length,
            documents=config.documents,
        )
        labels = held_out.tokens_BT1[:, 1:][held_out.loss_mask_BT]
        perplexity[name] = float(np.exp(nll_V[labels].mean()))
    return perplexity
