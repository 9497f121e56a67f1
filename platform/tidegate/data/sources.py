"""Finding and reading the files or the hub dataset of a domain, one document at a time."""

from __future__ import annotations

import glob
import hashlib
import lzma
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tidegate.config import ConfigError
from tidegate.data.config import DomainConfig

__all__ = ["Progress", "SourceFile", "expand", "find_files", "read_documents"]

Progress = Callable[[str, int, int], None]
"""Called with a stage name, the units done and the units in all (0 when nobody knows)."""

# Tests and installed packages are absent from some Pythons, and would make the domain depend on the machine.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_ROWS = re.compile(r"\.(parquet|jsonl(\.(gz|xz|zst|bz2))?)$")
_READ_ROWS = 1000
_HASH_BELOW_BYTES = 16 << 20


class SourceFile(NamedTuple):
    """A file and what tells it from another version of itself."""

    path: Path
    num_bytes: int
    identity: str


def expand(pattern: str, job_dir: Path) -> str:
    """Replace `{stdlib}` and `{job}`, escaped so that a bracket in a folder's name is not read as a glob."""
    stdlib = sysconfig.get_path("stdlib")
    return pattern.replace("{stdlib}", glob.escape(stdlib)).replace("{job}", glob.escape(str(job_dir)))


def find_files(domain: DomainConfig, job_dir: Path) -> list[SourceFile]:
    """The files of a domain that reads `paths`, each once, sorted within each glob.

    Raises:
        ConfigError: for a glob that matches no file.
    """
    found: dict[Path, None] = {}
    for pattern in domain.paths:
        matches = [Path(name) for name in sorted(glob.glob(expand(pattern, job_dir), recursive=True))]
        files = [path for path in matches if path.is_file()]
        if "{stdlib}" in pattern:
            stdlib = Path(sysconfig.get_path("stdlib"))
            files = [path for path in files if not _NOT_STDLIB & set(path.relative_to(stdlib).parts)]
        if not files:
            where = "" if Path(expand(pattern, job_dir)).is_absolute() else f" (looked in {Path.cwd()})"
            raise ConfigError(f"data.domains.{domain.name}.paths: no file matches {pattern!r}{where}")
        found.update(dict.fromkeys(files))
    return [_identify(path) for path in found]


def read_documents(
    domain: DomainConfig, files: Sequence[SourceFile], *, seed: int, progress: Progress
) -> Iterator[str]:
    """Every non-empty document of a domain, files in an order drawn from `seed`.

    Raises:
        ConfigError: for a file that is not UTF-8, not readable or lacks the text column.
    """
    stage = f"read {domain.name}"
    if domain.hub is not None:
        for done, text in enumerate(_hub_rows(domain), start=1):
            if done % _READ_ROWS == 0:
                progress(stage, done, 0)
            yield text
        return
    order = np.random.default_rng([seed, *domain.name.encode()]).permutation(len(files))
    for done, index in enumerate(order, start=1):
        path = files[index].path
        yield from _file_rows(domain, path) if _ROWS.search(path.name) else _whole_text(path)
        progress(stage, done, len(files))


def _identify(path: Path) -> SourceFile:
    try:
        status = path.stat()
        if status.st_size < _HASH_BELOW_BYTES:
            # A checkout or an unpacked archive has new mtimes every time; content finds the shards again.
            identity = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            identity = f"mtime {status.st_mtime_ns}"
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return SourceFile(path, status.st_size, identity)


def _whole_text(path: Path) -> Iterator[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"byte {error.start}", error) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if text:
        yield text


def _file_rows(domain: DomainConfig, path: Path) -> Iterator[str]:
    kind = "parquet" if path.suffix == ".parquet" else "json"

    def open_rows() -> Any:
        from datasets import load_dataset

        # One file at a time: files of one domain may have other columns beside the text, which `datasets` refuses
        # within one split. Streaming: no second copy of the corpus in a cache folder.
        name = glob.escape(str(path.resolve()))
        return load_dataset(kind, data_files=name, split="train", streaming=True)

    try:
        yield from _rows(open_rows, domain, str(path))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, _offset_of_bad_byte(path) if kind == "json" else "a row", error) from error


def _hub_rows(domain: DomainConfig) -> Iterator[str]:
    def open_rows() -> Any:
        from datasets import load_dataset

        return load_dataset(domain.hub, domain.hub_config, split=domain.split, streaming=True)

    where = f"data.domains.{domain.name}.hub: {domain.hub!r} split {domain.split!r}"
    try:
        yield from _rows(open_rows, domain, where)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error})") from error


def _rows(open_rows: Callable[[], Any], domain: DomainConfig, where: str) -> Iterator[str]:
    """The text column of a streaming dataset; what the readers raise becomes a ConfigError, save for bad UTF-8."""
    import zstandard

    unreadable = (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
    try:
        dataset = open_rows()
        for batch in dataset.iter(batch_size=_READ_ROWS):
            yield from _texts(batch, domain, where)
    except (ConfigError, UnicodeDecodeError):
        raise
    except StopIteration:  # how `datasets` reports a file without rows
        return
    except unreadable as error:
        raise ConfigError(f"{where}: cannot be read ({' '.join(str(error).split())})") from error


def _texts(batch: dict[str, list[Any]], domain: DomainConfig, where: str) -> Iterator[str]:
    field = domain.text_field
    if field not in batch:
        columns = ", ".join(batch)
        raise ConfigError(f"{where}: data.domains.{domain.name}.text_field: no column {field!r}; it has {columns}")
    for text in batch[field]:
        if text is not None and not isinstance(text, str):
            found = type(text).__name__
            raise ConfigError(f"{where}: data.domains.{domain.name}.text_field: {field!r} holds {found}, not text")
        if text:
            yield text


def _offset_of_bad_byte(path: Path) -> str:
    """Where the (decompressed) file stops being UTF-8; a line at a time, since no character spans a newline."""
    import fsspec

    offset = 0
    with fsspec.open(str(path), "rb", compression="infer") as stream:
        for line in stream:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"byte {offset + error.start}"
            offset += len(line)
    return "an unknown byte"


def _not_utf8(path: Path, place: str, error: UnicodeDecodeError) -> ConfigError:
    bad = error.object[error.start : error.start + 1].hex()
    return ConfigError(f"{path}: not UTF-8: {place} is 0x{bad} ({error.reason}); convert the file or leave it out")
