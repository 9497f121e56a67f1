"""Prepared folders that nobody wrote in good faith: the tokens that were written, or a ConfigError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.config import ConfigError
from tidegate.data.shards import MANIFEST_FILE, TokenDataset

fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its manifest
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


def tokens(folder: Path, verify: bool) -> list[int] | None:
    """All tokens of all streams; None if the folder was refused."""
    try:
        dataset = TokenDataset.open(folder, verify=verify)
    except ConfigError:
        return None
    streams = [dataset.stream(d, split) for d in range(len(dataset.domains)) for split in ("train", "held_out")]
    return [int(token) for stream in streams for token in stream.read(0, len(stream))]


@pytest.fixture
def prepared(two_domains: TokenDataset) -> Path:
    return two_domains.folder


@fuzzed
@given(st.data())
def test_any_byte_of_any_file_is_another(prepared: Path, data: st.DataObject) -> None:
    written = tokens(prepared, verify=True)
    assert written
    path = data.draw(st.sampled_from(sorted(prepared.iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.integers(1, 255))
    try:
        path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        found = tokens(prepared, verify=True)
        assert found is None or (path.name == MANIFEST_FILE and sorted(found) == sorted(written))
        tokens(prepared, verify=False)
        path.write_bytes(content[:place])
        assert tokens(prepared, verify=False) is None
    finally:
        path.write_bytes(content)


@fuzzed
@given(st.data())
def test_any_values_in_some_places_of_the_manifest(prepared: Path, data: st.DataObject) -> None:
    path = prepared / MANIFEST_FILE
    content = path.read_bytes()
    document: Any = json.loads(content)
    here = document
    while True:
        keys = sorted(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(here[key], dict | list) or not here[key] or data.draw(st.booleans()):
            break
        here = here[key]
    here[key] = data.draw(JSON | st.sampled_from(["../a.train.00000.bin", "/etc/passwd", "a.train.00000.bin", "\0"]))
    try:
        path.write_text(json.dumps(document), encoding="utf-8")
        tokens(prepared, verify=True)
        tokens(prepared, verify=False)
    finally:
        path.write_bytes(content)


@fuzzed
@given(st.binary(max_size=60))
def test_any_bytes_for_a_manifest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(data)
    assert tokens(tmp_path, verify=True) is None


def test_deep_json_for_a_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text("[" * 100_000, encoding="utf-8")
    assert tokens(tmp_path, verify=True) is None


@pytest.mark.parametrize("name", ["../b.train.00000.bin", "/tmp/b.train.00000.bin", "x/../b.train.00000.bin", ""])
def test_a_manifest_cannot_point_out_of_its_folder(prepared: Path, name: str) -> None:
    path = prepared / MANIFEST_FILE
    path.write_text(path.read_text(encoding="utf-8").replace("b.train.00000.bin", name), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"manifest\.json: domains\.1\.train\.shards\.0\.file: "):
        TokenDataset.open(prepared)


def test_a_link_is_no_shard(prepared: Path, tmp_path: Path) -> None:
    shard = prepared / "b.train.00000.bin"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"b\.train\.00000\.bin: is a link or a folder"):
        TokenDataset.open(prepared)
