"""Word frequencies, and the unigram baseline: what a model scores that knows them and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tidegate.data.config import DataConfig
from tidegate.data.loader import eval_windows
from tidegate.data.packing import read_windows
from tidegate.data.shards import TokenDataset

__all__ = ["token_frequencies", "unigram_perplexity"]


def token_frequencies(dataset: TokenDataset, config: DataConfig) -> npt.NDArray[np.float64]:
    """(V,) how often training reads each token: the domains' own frequencies, mixed by their weights; sums to 1."""
    weights = np.array([domain.weight for domain in config.domains])
    domains = [_counts(dataset, domain) for domain in range(len(dataset.domains))]
    return sum(w * c / c.sum() for w, c in zip(weights / weights.sum(), domains, strict=True))


def _counts(dataset: TokenDataset, domain: int) -> npt.NDArray[np.int64]:
    """(V,) tokens of a domain's training text."""
    counts_V = np.zeros(dataset.vocab_size, np.int64)
    for chunk in dataset.stream(domain, "train").chunks():
        counts_V += np.bincount(chunk, minlength=dataset.vocab_size)
    return counts_V


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
        counts_V = 1 + _counts(dataset, domain)
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
