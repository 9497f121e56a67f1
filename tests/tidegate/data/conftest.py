"""Small corpora as text, and datasets written straight from token lists so that every token is known."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tidegate.data import shards
from tidegate.data.config import DataConfig, DomainConfig, TrainedTokenizer
from tidegate.data.shards import DomainManifest, Manifest, Source, TokenDataset, TokenizerManifest

EOT = 0
VOCAB_SIZE = 300

Documents = Sequence[Sequence[int]]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A config of two text domains, `a` and `b`, that lie in tmp_path as .txt files."""

    def make(**changes: object) -> DataConfig:
        for name, seed in (("a", 1), ("b", 2)):
            words = random.Random(seed)
            folder = tmp_path / "text" / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(30):
                text = " ".join(f"{name}{words.randrange(50)}" for _ in range(60))
                (folder / f"{index:02d}.txt").write_text(text, encoding="utf-8")
        fields: dict[str, object] = {
            "domains": tuple(
                DomainConfig(name=name, paths=(f"{{job}}/text/{name}/*.txt",), held_out=0.1) for name in ("a", "b")
            ),
            "tokenizer": TrainedTokenizer(vocab_size=VOCAB_SIZE),
            "sequence_length": 16,
        }
        return DataConfig.model_validate(fields | changes)

    return make


@pytest.fixture
def loader_config() -> Callable[..., DataConfig]:
    """A config for datasets from `write_dataset`, given the weights of its domains by name."""

    def make(weights: Mapping[str, float], **changes: object) -> DataConfig:
        domains = [{"name": name, "paths": ["unused"], "weight": weight} for name, weight in weights.items()]
        fields: dict[str, object] = {
            "domains": domains,
            "tokenizer": {"vocab_size": VOCAB_SIZE, "kind": "train"},
            "sequence_length": 4,
        }
        return DataConfig.model_validate(fields | changes)

    return make


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., TokenDataset]:
    """Write documents of token ids (end-of-text included by the caller) as a dataset and open it."""

    def write(domains: Mapping[str, tuple[Documents, Documents]], name: str = "dataset") -> TokenDataset:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(b"{}")
        source = Source(hub=None, hub_config=None, hub_split=None, paths=(), files=0, bytes=0, sha256="")

        def split(stem: str, documents: Documents):  # type: ignore[no-untyped-def]
            return shards.write_shards(folder, stem, "uint16", [np.array(tokens) for tokens in documents])

        manifest = Manifest(
            version=1,
            request="test",
            dtype="uint16",
            tokenizer=TokenizerManifest(
                config=TrainedTokenizer(vocab_size=VOCAB_SIZE),
                sha256=hashlib.sha256(b"{}").hexdigest(),
                vocab_size=VOCAB_SIZE,
                eot_id=EOT,
            ),
            domains=tuple(
                DomainManifest(
                    name=domain,
                    source=source,
                    train=split(f"{domain}.train", train),
                    held_out=split(f"{domain}.held_out", held_out),
                )
                for domain, (train, held_out) in domains.items()
            ),
        )
        (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
        return TokenDataset.open(folder)

    return write


@pytest.fixture
def two_domains(write_dataset: Callable[..., TokenDataset]) -> TokenDataset:
    """Domain `a`: train 1..149 in documents of odd lengths; `b`: train 150..220; both with held-out tokens."""

    def documents(first: int, last: int, lengths: Sequence[int]) -> list[list[int]]:
        out, start = [], first
        while start <= last:
            stop = min(start + lengths[len(out) % len(lengths)], last + 1)
            out.append([*range(start, stop), EOT])
            start = stop
        return out

    return write_dataset(
        {
            "a": (documents(1, 149, [7, 1, 13]), documents(230, 256, [5])),
            "b": (documents(150, 220, [3, 11]), documents(257, 270, [9])),
        }
    )
