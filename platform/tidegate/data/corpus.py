"""From documents to pieces: cut, de-duplicated, capped, shuffled and split into train and held-out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tidegate.config import ConfigError
from tidegate.data.config import DomainConfig

__all__ = ["Corpus", "cut", "split_corpus"]


class Corpus(NamedTuple):
    """The pieces of one domain, held in memory: cap a huge source with `max_chars`."""

    train: list[str]
    held_out: list[str]


def cut(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into pieces of at most `max_chars` characters that join to the text again.

    A cut falls after the last newline in the final quarter of the piece, or at `max_chars` when there is none.
    """
    start = 0
    while len(text) - start > max_chars:
        newline = text.rfind("\n", start + 3 * max_chars // 4, start + max_chars)
        stop = newline + 1 if newline >= 0 else start + max_chars
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def split_corpus(domain: DomainConfig, documents: Iterable[str], *, max_document_chars: int, seed: int) -> Corpus:
    """Read a domain to its cap and split it.

    Raises:
        ConfigError: for a domain with fewer than two different pieces: each split needs one.
    """
    pieces = list(_capped(_distinct(documents, max_document_chars), domain.max_chars))
    if len(pieces) < 2:
        found = "no text" if not pieces else "a single document"
        raise ConfigError(
            f"data.domains.{domain.name}: {found}; two different documents (or a smaller "
            f"data.max_document_chars than {max_document_chars}) are needed to hold one out"
        )
    # The name, not the position: adding a domain leaves the splits of the others as they are.
    order = np.random.default_rng([seed, *domain.name.encode(), 1]).permutation(len(pieces))
    num_held_out = min(max(round(len(pieces) * domain.held_out), 1), len(pieces) - 1)
    shuffled = [pieces[index] for index in order]
    return Corpus(train=shuffled[num_held_out:], held_out=shuffled[:num_held_out])


def _distinct(documents: Iterable[str], max_document_chars: int) -> Iterator[str]:
    seen: set[bytes] = set()
    for document in documents:
        for piece in cut(document, max_document_chars):
            digest = hashlib.blake2b(piece.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield piece


def _capped(pieces: Iterable[str], max_chars: int | None) -> Iterator[str]:
    left = max_chars
    for piece in pieces:
        if left is None:
            yield piece
            continue
        yield piece[:left]
        left -= min(left, len(piece))
        if left == 0:
            return
