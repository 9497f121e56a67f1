"""Cutting a token stream into windows, and what a window says about its documents.

T  sequence length (label positions)
B  sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tidegate.config import ConfigError
from tidegate.data.config import DataConfig
from tidegate.data.shards import Split, TokenDataset

__all__ = ["Sequences", "check_lengths", "num_windows", "read_windows"]


class Sequences(NamedTuple):
    """Packed sequences; inputs are `tokens[:, :-1]`, labels `tokens[:, 1:]`."""

    tokens_BT1: npt.NDArray[np.int64]
    documents_BT: npt.NDArray[np.int32]
    """Of the input positions: 0 at the start of the window, one more after each end-of-text."""
    loss_mask_BT: npt.NDArray[np.bool_]
    """False where the label belongs to another document than the input."""


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows of `sequence_length + 1` tokens in a stream; neighbours share one token, so each label comes once."""
    return max(num_tokens - 1, 0) // sequence_length


def read_windows(
    dataset: TokenDataset,
    places: Sequence[tuple[int, Split, int]],
    *,
    sequence_length: int,
    documents: Literal["isolate", "join"],
) -> Sequences:
    """Read windows from anywhere in a dataset.

    Args:
        dataset: the prepared tokens.
        places: domain index, split and window number of each of the B sequences.
        sequence_length: T.
        documents: "isolate" or "join".
    """
    tokens_BT1 = np.empty((len(places), sequence_length + 1), np.int64)
    for row, (domain, split, window) in enumerate(places):
        start = window * sequence_length
        tokens_BT1[row] = dataset.stream(domain, split).read(start, start + sequence_length + 1)
    return Sequences(tokens_BT1, *_boundaries(tokens_BT1, dataset.eot_id, documents))


def check_lengths(dataset: TokenDataset, config: DataConfig) -> None:
    """Refuse a domain with less than one sequence in a split.

    Raises:
        ConfigError: naming the domain, the split and what it has.
    """
    needed = config.sequence_length + 1
    splits: tuple[Split, ...] = ("train", "held_out")
    for index, name in enumerate(dataset.domains):
        for split in splits:
            found = len(dataset.stream(index, split))
            if found < needed:
                remedy = "raise held_out" if split == "held_out" else "lower held_out"
                raise ConfigError(
                    f"data.domains.{name}: its {split} split has {found} tokens, one sequence takes {needed} "
                    f"(data.sequence_length {config.sequence_length}); add text, {remedy} or shorten the sequence"
                )


def _boundaries(
    tokens_BT1: npt.NDArray[np.int64], eot_id: int, documents: Literal["isolate", "join"]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    ends_BT = tokens_BT1[:, :-1] == eot_id
    if documents == "join":
        return np.zeros(ends_BT.shape, np.int32), np.ones(ends_BT.shape, np.bool_)
    documents_BT = np.zeros(ends_BT.shape, np.int32)
    np.cumsum(ends_BT[:, :-1], axis=1, out=documents_BT[:, 1:])
    return documents_BT, ~ends_BT
