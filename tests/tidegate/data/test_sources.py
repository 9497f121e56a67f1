from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tidegate.config import ConfigError
from tidegate.data import sources
from tidegate.data.config import DomainConfig
from tidegate.data.sources import find_files, read_documents

TEXTS = [
    "first line\nsecond line",
    "Gr\u00fc\u00dfe, \u4e16\u754c",
    "tail \U0001f30a",
    "2024-01-02 is no date here",
    '"q"',
]
ROWS = [{"text": text, "number": index} for index, text in enumerate(TEXTS)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()

WRITERS = {
    "c.jsonl": lambda path: path.write_bytes(JSONL),
    "c.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL)),
    "c.jsonl.xz": lambda path: path.write_bytes(lzma.compress(JSONL)),
    "c.jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(JSONL)),
    "c.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(JSONL)),
    "c.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


def documents(domain: DomainConfig, job_dir: Path, seed: int = 0) -> list[str]:
    files = find_files(domain, job_dir) if domain.paths else []
    return list(read_documents(domain, files, seed=seed, progress=lambda stage, done, total: None))


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert documents(DomainConfig(name="a", paths=(f"{{job}}/{name}",)), tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", ["txt", "py", "json"])
def test_other_files_are_one_document_each(suffix: str, tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.{suffix}").write_bytes(text.encode())
    found = documents(DomainConfig(name="a", paths=(str(tmp_path / f"*.{suffix}"),)), tmp_path)
    assert sorted(found) == sorted(TEXTS)


def test_line_ends_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert documents(DomainConfig(name="a", paths=("{job}/a.txt",)), tmp_path) == ["one\r\ntwo\rthree\n"]


def test_a_hub_dataset_reads_the_named_split(tmp_path: Path) -> None:
    # A folder laid out as a hub dataset goes through the same call as a name on the hub.
    WRITERS["c.parquet"](tmp_path / "train-00000.parquet")
    other = pyarrow.Table.from_pylist([{"text": "other split"}])
    pyarrow.parquet.write_table(other, tmp_path / "test-00000.parquet")
    assert documents(DomainConfig(name="a", hub=str(tmp_path)), tmp_path) == TEXTS
    assert documents(DomainConfig(name="a", hub=str(tmp_path), split="test"), tmp_path) == ["other split"]
    with pytest.raises(ConfigError, match=r"data.domains.a.hub: .* split 'nope'"):
        documents(DomainConfig(name="a", hub=str(tmp_path), split="nope"), tmp_path)


def test_files_of_one_domain_may_differ_in_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two", "y": {"z": 2}}\n')
    assert sorted(documents(DomainConfig(name="a", paths=("{job}/*.jsonl",)), tmp_path)) == ["one", "two"]


def test_brackets_in_names_are_not_globs(tmp_path: Path) -> None:
    job_dir = tmp_path / "run[1]"
    job_dir.mkdir()
    (job_dir / "a.jsonl").write_text('{"text": "one"}\n')
    (job_dir / "b.txt").write_text("two")
    domain = DomainConfig(name="a", paths=("{job}/*.jsonl", "{job}/b.txt"))
    assert sorted(documents(domain, job_dir)) == ["one", "two"]


def test_the_order_of_files_is_drawn_from_the_seed(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02d}.txt").write_text(str(index))
    domain = DomainConfig(name="a", paths=("{job}/*.txt", "{job}/0*.txt"))
    first, again, other = (documents(domain, tmp_path, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == sorted(str(index) for index in range(20))


def test_stdlib_means_the_standard_library_without_its_tests(tmp_path: Path) -> None:
    files = find_files(DomainConfig(name="a", paths=("{stdlib}/**/*.py",)), tmp_path)
    stdlib = Path(sysconfig.get_path("stdlib"))
    relative = {file.path.relative_to(stdlib).as_posix() for file in files}
    assert {"ast.py", "json/decoder.py"} <= relative
    assert not [name for name in relative if {"site-packages", "test", "idlelib"} & set(name.split("/"))]


def test_null_and_empty_rows_are_skipped_and_an_empty_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.txt").write_text("")
    assert documents(DomainConfig(name="a", paths=("{job}/*",)), tmp_path) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xc3\xa9 caf\xe9!", r"a\.txt: not UTF-8: byte 9 is 0xe9"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9!"}\n', r"a\.jsonl: not UTF-8: byte 28 is 0xe9"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}\n'), r"a\.jsonl\.gz: not UTF-8: byte 10 is 0xff"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl: .*text_field: no column 'text'; it has body, id"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl: .*text_field: 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "x"\n{', r"a\.jsonl: cannot be read \(.*JSON"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-12], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.xz", b"not xz", r"a\.jsonl\.xz: cannot be read"),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst: cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read"),
    ],
    ids=["latin1-txt", "latin1-jsonl", "latin1-gz", "column", "type", "json", "cut-gz", "xz", "zst", "parquet"],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        documents(DomainConfig(name="a", paths=(f"{{job}}/{name}",)), tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_glob_without_a_file_is_named(tmp_path: Path) -> None:
    domain = DomainConfig(name="a", paths=("no/such/*.txt",))
    with pytest.raises(ConfigError, match=r"data\.domains\.a\.paths: no file matches 'no/such/\*\.txt' \(looked in"):
        find_files(domain, tmp_path)


def test_big_files_are_told_apart_by_mtime_and_small_ones_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = DomainConfig(name="a", paths=("{job}/a.txt",))
    path = tmp_path / "a.txt"
    path.write_text("same size")
    identities = {}
    for threshold in (9, 10):
        monkeypatch.setattr(sources, "_HASH_BELOW_BYTES", threshold)
        os.utime(path, ns=(1, 1))
        first = find_files(domain, tmp_path)
        os.utime(path, ns=(2, 2))
        identities[threshold] = first == find_files(domain, tmp_path)
    assert identities == {9: False, 10: True}
