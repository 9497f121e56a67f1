"""Manifests that nobody wrote in good faith: a checkpoint is what was written, or Damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.train.checkpoint_store import MANIFEST, CheckpointStore, Damaged, seal, unseal
from tidegate.train.storage import Storage, StorageError

fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its file
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.text(), JSON, max_size=4)
PATHS = st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "\0", "state", MANIFEST, "~", "C:"]), max_size=4)
NAME = "step_00000007-a"


def resealed(body: bytes) -> bytes:
    """A body under a digest that is right, as someone who wants to be believed would write it."""
    zeros = b'"sha256_of_the_rest": "' + b"0" * 64 + b'"'
    text = body + zeros
    return body + zeros.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode())


@fuzzed
@given(DOCUMENTS, st.data())
def test_what_was_sealed_comes_back_and_any_other_byte_is_found(document: dict[str, Any], data: st.DataObject) -> None:
    sealed = seal(document)
    assert json.dumps(unseal(sealed)) == json.dumps(document)  # NaN is not itself
    place = data.draw(st.integers(0, len(sealed) - 1))
    flipped = bytearray(sealed)
    flipped[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Damaged):
        unseal(bytes(flipped))
    with pytest.raises(Damaged):
        unseal(sealed[:place])


@fuzzed
@given(
    st.binary(max_size=80) | st.binary(max_size=40).map(resealed) | JSON.map(lambda value: json.dumps(value).encode())
)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    place = tmp_path / NAME / MANIFEST
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    store = CheckpointStore(Storage(tmp_path))
    with pytest.raises(Damaged):
        store.manifest(NAME)
    assert store.entry(NAME).problem
    assert store.damage(NAME)
    (tmp_path / "owner.json").write_bytes(data)
    with pytest.raises(StorageError):
        store.check_owner("a")


@fuzzed
@given(st.data())
def test_a_sealed_manifest_with_any_values_in_some_places(tmp_path: Path, data: st.DataObject) -> None:
    record = {"size": 3, "sha256": "0" * 64}
    document: dict[str, Any] = {
        "tidegate": "0",
        "step": 7,
        "tokens": 70,
        "layout": {},
        "model": {},
        "metrics": {"train/loss": 1.0},
        "files": {"state/a.pt": record},
    }
    key = data.draw(st.sampled_from(sorted(document)))
    document[key] = data.draw(JSON | st.dictionaries(PATHS.map("/".join), st.just(record) | JSON, max_size=3))
    place = tmp_path / NAME / MANIFEST
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(seal(document))
    store = CheckpointStore(Storage(tmp_path))
    try:
        manifest = store.manifest(NAME)
    except Damaged:
        return
    for file in manifest.files:
        assert (tmp_path / NAME / file).resolve().is_relative_to((tmp_path / NAME).resolve())
    assert store.damage(NAME) or not manifest.files
