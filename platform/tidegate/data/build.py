"""Building the token shards of a job, once, and finding them again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidegate.config import ConfigError
from tidegate.data.config import DataConfig, DomainConfig, TokenizerFile
from tidegate.data.corpus import Corpus, split_corpus
from tidegate.data.packing import check_lengths
from tidegate.data.shards import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    DomainManifest,
    Manifest,
    Source,
    Split,
    SplitManifest,
    TokenDataset,
    TokenizerManifest,
    shard_dtype,
    write_shards,
)
from tidegate.data.sources import Progress, SourceFile, find_files, read_documents
from tidegate.data.tokenizer import BuiltTokenizer, load_tokenizer, tokenizer_file, train_tokenizer

__all__ = ["encode", "find", "prepare", "read_corpus"]

_ENCODE_DOCUMENTS = 512
_BUILDING = ".building-"
_ABANDONED_AFTER_S = 24 * 3600


class _Request(NamedTuple):
    """What decides the tokens: the text, how it is cut and split, and the tokenizer."""

    config: DataConfig
    files: dict[str, list[SourceFile]]
    tokenizer: bytes | None

    @property
    def sha256(self) -> str:
        config = self.config
        # Weights, sequence length and evaluation size are left out: they choose among tokens, and make none.
        domains = [
            {
                "domain": domain.model_dump(exclude={"weight", "paths"}),
                "files": [[file.path.name, file.num_bytes, file.identity] for file in self.files[domain.name]],
            }
            for domain in config.domains
        ]
        tokenizer: Any = config.tokenizer.model_dump()
        if self.tokenizer is not None:
            tokenizer = hashlib.sha256(self.tokenizer).hexdigest()
        content = [FORMAT_VERSION, domains, tokenizer, config.max_document_chars, config.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _silent(stage: str, done: int, total: int) -> None:
    pass


def prepare(config: DataConfig, *, cache_dir: Path, job_dir: Path, progress: Progress | None = None) -> Path:
    """Turn the text of a job into token shards, or find the shards of an earlier call.

    The text of all domains is held in memory while it is encoded. Safe to call from several processes at once: each
    builds in a folder of its own and the first to finish wins.

    Args:
        config: the job's data section.
        cache_dir: made when missing; holds one folder per different request.
        job_dir: what `{job}` stands for.
        progress: called with stage, done, total; total is 0 when unknown.

    Returns:
        The folder for `TokenDataset.open`.

    Raises:
        ConfigError: for text that cannot be read or is too little, for a tokenizer without `<|endoftext|>`, and for a
            cache_dir that is full or cannot be written.
    """
    request = _request(config, job_dir)
    folder = _folder(request, cache_dir)
    if not (folder / MANIFEST_FILE).exists():
        _build_atomically(request, folder, progress or _silent)
    check_lengths(TokenDataset.open(folder, verify=False), config)
    return folder


def find(config: DataConfig, *, cache_dir: Path, job_dir: Path) -> Path | None:
    """The token shards that an earlier `prepare` made; None if there are none.

    Raises:
        ConfigError: for text that cannot be read.
    """
    folder = _folder(_request(config, job_dir), cache_dir)
    return folder if (folder / MANIFEST_FILE).exists() else None


def _request(config: DataConfig, job_dir: Path) -> _Request:
    files = {domain.name: find_files(domain, job_dir) for domain in config.domains}
    document = tokenizer_file(config.tokenizer, job_dir) if isinstance(config.tokenizer, TokenizerFile) else None
    return _Request(config, files, document)


def _folder(request: _Request, cache_dir: Path) -> Path:
    return cache_dir / f"tokens-{request.sha256[:16]}"


def _build_atomically(request: _Request, folder: Path, progress: Progress) -> None:
    building = folder.with_name(f"{_BUILDING}{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        _build(request, building, progress)
        _publish(building, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{folder.parent}: no space left for the token shards; free some or move it") from error
        raise ConfigError(f"{folder.parent}: cannot write the token shards ({error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (folder / MANIFEST_FILE).exists():
            raise ConfigError(f"{folder}: exists but has no {MANIFEST_FILE}; delete it") from error
        # Otherwise another process built the same request first: its folder serves.


def _remove_abandoned(cache_dir: Path) -> None:
    """Delete what killed builds left; a living one adds a file at least every shard, well within a day."""
    for leftover in cache_dir.glob(f"{_BUILDING}*"):
        try:
            abandoned = time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_S
        except FileNotFoundError:  # its builder finished meanwhile
            continue
        if abandoned:
            shutil.rmtree(leftover, ignore_errors=True)


def _build(request: _Request, folder: Path, progress: Progress) -> None:
    config = request.config
    corpora = [_read(config, domain, request.files[domain.name], progress) for domain in config.domains]
    # Decides whether the Rust side uses all cores; left alone when the user has set it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    built = _tokenizer(request, corpora, progress)
    (folder / TOKENIZER_FILE).write_bytes(built.document)
    vocab_size = built.tokenizer.get_vocab_size()
    dtype = shard_dtype(vocab_size)

    def write(name: str, split: Split, texts: Sequence[str]) -> SplitManifest:
        documents = encode(built, texts, f"encode {name} {split}", progress)
        return write_shards(folder, f"{name}.{split}", dtype, documents)

    manifest = Manifest(
        version=FORMAT_VERSION,
        request=request.sha256,
        dtype=dtype,
        tokenizer=TokenizerManifest(
            config=config.tokenizer, sha256=built.sha256, vocab_size=vocab_size, eot_id=built.eot_id
        ),
        domains=tuple(
            DomainManifest(
                name=domain.name,
                source=_source(domain, request.files[domain.name]),
                train=write(domain.name, "train", corpus.train),
                held_out=write(domain.name, "held_out", corpus.held_out),
            )
            for domain, corpus in zip(config.domains, corpora, strict=True)
        ),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def encode(
    built: BuiltTokenizer, texts: Sequence[str], stage: str = "encode", progress: Progress = _silent
) -> Iterator[npt.NDArray[np.uint32]]:
    """(length,) token ids of each text, end-of-text last; a text that a tokenizer drops altogether is skipped."""
    for start in range(0, len(texts), _ENCODE_DOCUMENTS):
        batch = list(texts[start : start + _ENCODE_DOCUMENTS])
        for encoding in built.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            if encoding.ids:
                yield np.array([*encoding.ids, built.eot_id], np.uint32)
        progress(stage, start + len(batch), len(texts))


def read_corpus(config: DataConfig, domain: DomainConfig, job_dir: Path) -> Corpus:
    """The documents of a domain as `prepare` splits them.

    Raises:
        ConfigError: for text that cannot be read or is too little.
    """
    return _read(config, domain, find_files(domain, job_dir), _silent)


def _read(config: DataConfig, domain: DomainConfig, files: Sequence[SourceFile], progress: Progress) -> Corpus:
    documents = read_documents(domain, files, seed=config.seed, progress=progress)
    return split_corpus(domain, documents, max_document_chars=config.max_document_chars, seed=config.seed)


def _tokenizer(request: _Request, corpora: Sequence[Corpus], progress: Progress) -> BuiltTokenizer:
    config = request.config.tokenizer
    if isinstance(config, TokenizerFile):
        assert request.tokenizer is not None
        return load_tokenizer(request.tokenizer, f"data.tokenizer.path: {config.path!r}")
    progress("train tokenizer", 0, 1)
    built = train_tokenizer(config, [text for corpus in corpora for text in corpus.train])
    progress("train tokenizer", 1, 1)
    return built


def _source(domain: DomainConfig, files: Sequence[SourceFile]) -> Source:
    identities = "\n".join(f"{file.path.name} {file.num_bytes} {file.identity}" for file in files)
    return Source(
        hub=domain.hub,
        hub_config=domain.hub_config,
        hub_split=domain.split if domain.hub is not None else None,
        paths=domain.paths,
        files=len(files),
        bytes=sum(file.num_bytes for file in files),
        sha256=hashlib.sha256(identities.encode()).hexdigest(),
    )
