"""Multi-query associative recall (MQAR): pairs of keys and values, and later the keys again; say the values.

What softmax attention learns at once, and a mixer only if it can bind a key to the token behind it and hold many pairs.
Source: "Zoology" (arXiv 2312.04927), section 3 and appendix E.

Letters: B sequences, T tokens, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Recall", "recall_batch"]

_NEARNESS = 0.01
"""The exponent a of the power law of distances: most queries come soon after the pairs."""


class Recall(NamedTuple):
    tokens_BT: torch.Tensor
    """int64; 0 where nothing is said."""
    labels_BT: torch.Tensor
    """int64; at a key that is asked for, its value."""
    counted_BT: torch.Tensor
    """bool; where a key is asked for."""


def recall_batch(
    sequences: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator | None = None
) -> Recall:
    """A batch. Keys are the lower half of the vocabulary but 0, values the upper half; each key is asked for once.

    Args:
        sequences: B.
        length: T, even, at least 4 P.
        pairs: P, fewer than half of the vocabulary.
        vocab_size: even.
        generator: draws all of it.

    Raises:
        ValueError: the pairs and their queries do not fit.
    """
    half, slots = vocab_size // 2, length // 2 - pairs
    if length % 2 or vocab_size % 2 or pairs > slots or pairs >= half:
        raise ValueError(
            f"length={length}, pairs={pairs}, vocab_size={vocab_size}: length and vocab_size are even, with "
            "length >= 4 pairs and vocab_size > 2 pairs"
        )

    def some_of(weights: torch.Tensor) -> torch.Tensor:
        """(B, P) different places, drawn by weight (Gumbel top-k)."""
        uniform = torch.rand(sequences, len(weights), generator=generator).clamp(min=1e-12)
        return (weights.log() - (-uniform.log()).log()).topk(pairs, dim=1).indices

    keys_BP = 1 + some_of(torch.ones(half - 1))
    values_BP = half + some_of(torch.ones(half))
    slots_BP = some_of(torch.arange(1, slots + 1).double() ** (_NEARNESS - 1))
    tokens_BT = torch.zeros(sequences, length, dtype=torch.int64)
    labels_BT = torch.zeros_like(tokens_BT)
    tokens_BT[:, 0 : 2 * pairs : 2], tokens_BT[:, 1 : 2 * pairs : 2] = keys_BP, values_BP
    asked_BP = 2 * pairs + 2 * slots_BP
    tokens_BT.scatter_(1, asked_BP, keys_BP)
    labels_BT.scatter_(1, asked_BP, values_BP)
    return Recall(tokens_BT, labels_BT, labels_BT > 0)
