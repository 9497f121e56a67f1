"""A prepared dataset of random tokens, for measuring speed: the loader reads it as it reads text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidegate.data.config import DataConfig
from tidegate.data.shards import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    DomainManifest,
    Manifest,
    Source,
    TokenizerManifest,
    shard_dtype,
    write_shards,
)

__all__ = ["write_random_tokens"]

_EOT = 0
_DOCUMENT_TOKENS = 300


def write_random_tokens(folder: Path, config: DataConfig, *, vocab_size: int, num_windows: int) -> None:
    """Write the job's domains as random documents of 300 tokens, the same for the same `config`.

    Args:
        folder: exists and is empty.
        config: the job's data section; its text is not read.
        vocab_size: V; every id but that of the end of a document is equally likely.
        num_windows: training sequences a domain. Held-out text is one sequence.
    """
    dtype = shard_dtype(vocab_size)
    rng = np.random.default_rng(config.seed)

    def documents(windows: int) -> list[npt.NDArray[np.int64]]:
        num_documents = -(-(windows * config.sequence_length + 1) // _DOCUMENT_TOKENS)
        tokens = rng.integers(1, vocab_size, (num_documents, _DOCUMENT_TOKENS))
        tokens[:, -1] = _EOT
        return list(tokens)

    source = Source(hub=None, hub_config=None, hub_split=None, paths=(), files=0, bytes=0, sha256="")
    domains = [
        DomainManifest(
            name=domain.name,
            source=source,
            train=write_shards(folder, f"{domain.name}.train", dtype, documents(num_windows)),
            held_out=write_shards(folder, f"{domain.name}.held_out", dtype, documents(1)),
        )
        for domain in config.domains
    ]
    tokenizer = b"{}"  # nothing decodes random tokens
    (folder / TOKENIZER_FILE).write_bytes(tokenizer)
    manifest = Manifest(
        version=FORMAT_VERSION,
        request="random",
        dtype=dtype,
        tokenizer=TokenizerManifest(
            config=config.tokenizer,
            sha256=hashlib.sha256(tokenizer).hexdigest(),
            vocab_size=vocab_size,
            eot_id=_EOT,
        ),
        domains=tuple(domains),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(), encoding="utf-8")
