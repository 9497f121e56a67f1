"""Token shards on disk: writing them, checking them, and reading a domain's tokens as one stream.

A prepared folder holds `tokenizer.json`, `manifest.json` and the shards, flat little-endian arrays of token ids:
`DOMAIN.SPLIT.NNNNN.bin`. The manifest is written last; a folder without one is not a dataset.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from tidegate.config import Config, ConfigError
from tidegate.data.config import DataConfig, TokenizerConfig, TokenizerFile
from tidegate.data.tokenizer import load_tokenizer, token_bytes, tokenizer_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "TOKENIZER_FILE",
    "DomainManifest",
    "Manifest",
    "Split",
    "SplitManifest",
    "TokenDataset",
    "TokenStream",
    "check_tokenizer",
    "shard_dtype",
    "write_shards",
]

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
SHARD_TOKENS = 64 << 20
_HASH_BLOCK_BYTES = 1 << 20

Split = Literal["train", "held_out"]


class Shard(Config):
    file: str = Field(pattern=r"^[a-z0-9_]+\.(train|held_out)\.[0-9]{5,}\.bin$")
    """A name and no path: a manifest cannot point out of its folder."""
    tokens: int = Field(ge=1)
    sha256: str


class SplitManifest(Config):
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _shards_add_up(self) -> SplitManifest:
        found = sum(shard.tokens for shard in self.shards)
        if found != self.tokens:
            raise ValueError(f"tokens={self.tokens}, but the shards hold {found}")
        return self


class Source(Config):
    """Where a domain's text came from, as the job wrote it."""

    hub: str | None
    hub_config: str | None
    hub_split: str | None
    paths: tuple[str, ...]
    files: int
    bytes: int
    sha256: str
    """Of the names, sizes and identities of the files."""


class DomainManifest(Config):
    name: str
    source: Source
    train: SplitManifest
    held_out: SplitManifest


class TokenizerManifest(Config):
    config: TokenizerConfig
    sha256: str
    vocab_size: int
    eot_id: int


class Manifest(Config):
    """`manifest.json`: what the shards of a folder hold."""

    version: int
    request: str
    """Hash of what was asked for; names the folder."""
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerManifest
    domains: tuple[DomainManifest, ...]


def shard_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shards(folder: Path, stem: str, dtype: str, documents: Iterable[npt.NDArray[Any]]) -> SplitManifest:
    """Write documents end to end as `STEM.NNNNN.bin`, a new file every `SHARD_TOKENS` tokens.

    Args:
        folder: exists.
        stem: of the file names.
        dtype: "uint16" or "uint32".
        documents: (length,) token ids of each document, its end-of-text token included.
    """
    shards: list[Shard] = []
    num_documents = 0
    waiting: list[npt.NDArray[Any]] = []
    num_waiting = 0

    def flush(num_tokens: int) -> None:
        nonlocal num_waiting
        tokens = np.concatenate(waiting)
        head, tail = tokens[:num_tokens], tokens[num_tokens:]
        name = f"{stem}.{len(shards):05d}.bin"
        data = head.astype(_little_endian(dtype)).tobytes()
        (folder / name).write_bytes(data)
        shards.append(Shard(file=name, tokens=len(head), sha256=hashlib.sha256(data).hexdigest()))
        waiting[:] = [tail]
        num_waiting = len(tail)

    for document in documents:
        num_documents += 1
        waiting.append(document)
        num_waiting += len(document)
        while num_waiting >= SHARD_TOKENS:
            flush(SHARD_TOKENS)
    if num_waiting:
        flush(num_waiting)
    total = sum(shard.tokens for shard in shards)
    return SplitManifest(documents=num_documents, tokens=total, shards=tuple(shards))


class TokenStream:
    """The tokens of one domain and split as one array that lies in several memory-mapped files."""

    def __init__(self, folder: Path, split: SplitManifest, dtype: str) -> None:
        self._maps = [np.memmap(folder / shard.file, _little_endian(dtype), mode="r") for shard in split.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in split.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `start..stop` as a new (stop - start,) int64 array; 0 <= start <= stop <= len."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        out = np.empty(stop - start, np.int64)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for index in range(first, len(self._maps)):
            base = int(self._starts[index])
            if base >= stop:
                break
            low, high = max(start, base), min(stop, int(self._starts[index + 1]))
            out[low - start : high - start] = self._maps[index][low - base : high - base]
        return out

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """The shards in order, as memory maps."""
        yield from self._maps


class TokenDataset:
    """A prepared folder, opened. Open it in every process instead of sending it: pickling would copy the tokens."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.domains = tuple(domain.name for domain in manifest.domains)
        self.vocab_size = manifest.tokenizer.vocab_size
        self.eot_id = manifest.tokenizer.eot_id
        self.tokenizer_sha256 = manifest.tokenizer.sha256
        self._streams = {
            (index, split): TokenStream(folder, getattr(domain, split), manifest.dtype)
            for index, domain in enumerate(manifest.domains)
            for split in ("train", "held_out")
        }

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> TokenDataset:
        """Open a folder that `prepare` returned.

        Args:
            folder: the prepared dataset.
            verify: read every shard and compare its sha256; False compares sizes only.

        Raises:
            ConfigError: for a folder without a manifest or with another format version, and for a file that is
                missing, truncated or changed.
        """
        manifest = _read_manifest(folder / MANIFEST_FILE)
        itemsize = _little_endian(manifest.dtype).itemsize
        for domain in manifest.domains:
            for shard in (*domain.train.shards, *domain.held_out.shards):
                _check_size(folder / shard.file, shard.tokens * itemsize)
                if verify:
                    _check_hash(folder / shard.file, shard.sha256)
        _check_hash(folder / TOKENIZER_FILE, manifest.tokenizer.sha256)
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and the tokenizer: equal on machines that prepared the same text separately."""
        parts = [self.tokenizer_sha256, *self.domains]
        for domain in self.manifest.domains:
            parts += [shard.sha256 for shard in (*domain.train.shards, *domain.held_out.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """(V,) bytes of UTF-8 text that each token stands for; None where the tokenizer is not byte-level."""
        return token_bytes((self.folder / TOKENIZER_FILE).read_bytes(), self.vocab_size)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That encoded the tokens."""
        path = self.folder / TOKENIZER_FILE
        return load_tokenizer(path.read_bytes(), str(path)).tokenizer

    def stream(self, domain: int, split: Split) -> TokenStream:
        """The tokens of the domain with this index."""
        return self._streams[domain, split]


def check_tokenizer(dataset: TokenDataset, config: DataConfig, *, job_dir: Path) -> None:
    """Refuse a dataset that was encoded with another tokenizer than the job names.

    Raises:
        ConfigError: naming the job's tokenizer and the dataset's.
    """
    stored = dataset.manifest.tokenizer
    theirs = f"{dataset.folder / TOKENIZER_FILE} (sha256 {stored.sha256})"
    if isinstance(config.tokenizer, TokenizerFile):
        wanted = hashlib.sha256(tokenizer_file(config.tokenizer, job_dir)).hexdigest()
        if wanted != stored.sha256:
            raise ConfigError(
                f"data.tokenizer.path: {config.tokenizer.path!r} (sha256 {wanted}) is not the tokenizer "
                f"of the dataset, {theirs}"
            )
    elif config.tokenizer != stored.config:
        raise ConfigError(
            f"data.tokenizer: the job trains a vocabulary of {config.tokenizer.vocab_size}, the dataset was encoded "
            f"with {stored.config!r}, {theirs}"
        )


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent}: not a prepared dataset, it has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: format version {version!r}, this Tidegate reads {FORMAT_VERSION}; prepare it again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {field}: {first['msg']}") from error


def _check_size(path: Path, expected: int) -> None:
    try:
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: missing ({error.strerror}); prepare the dataset again") from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: is a link or a folder, not a file that was prepared; prepare the dataset again")
    found = status.st_size
    if found != expected:
        raise ConfigError(f"{path}: expected {expected} bytes, found {found}; delete the folder and prepare it again")


def _check_hash(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); prepare the dataset again") from error
    if digest.hexdigest() != expected:
        raise ConfigError(
            f"{path}: expected sha256 {expected}, found {digest.hexdigest()}; delete the folder and prepare it again"
        )
