from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tidegate.config import ConfigError
from tidegate.data import shards
from tidegate.data.config import DataConfig, TokenizerFile, TrainedTokenizer
from tidegate.data.shards import TokenDataset, TokenStream, check_tokenizer, shard_dtype, write_shards


@pytest.mark.parametrize("shard_tokens", [1, 7, 63, 64, 1000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_read_as_one_stream(
    shard_tokens: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", shard_tokens)
    documents = [np.arange(first, first + 9) * 900 % 65536 for first in range(7)]
    expected = np.concatenate(documents)
    split = write_shards(tmp_path, "a.train", dtype, documents)
    assert (split.documents, split.tokens) == (7, 63)
    sizes = [(tmp_path / shard.file).stat().st_size for shard in split.shards]
    assert sum(sizes) == 63 * np.dtype(dtype).itemsize
    assert all(0 < shard.tokens <= shard_tokens for shard in split.shards)
    stream = TokenStream(tmp_path, split, dtype)
    for start in range(64):
        for stop in range(start, 64):
            assert np.array_equal(stream.read(start, stop), expected[start:stop])
    assert stream.read(0, 63).dtype == np.int64


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert (shard_dtype(65536), shard_dtype(65537)) == ("uint16", "uint32")
    split = write_shards(tmp_path, "a.train", "uint32", [np.array([151642, 65536])])
    assert TokenStream(tmp_path, split, "uint32").read(0, 2).tolist() == [151642, 65536]
    assert (tmp_path / "a.train.00000.bin").read_bytes() == bytes.fromhex("5a5002 00 000001 00")


def test_a_flipped_byte_is_refused_by_name(two_domains: TokenDataset) -> None:
    path = two_domains.folder / "b.train.00000.bin"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    shard = two_domains.manifest.domains[1].train.shards[0]
    with pytest.raises(
        ConfigError, match=rf"b\.train\.00000\.bin: expected sha256 {shard.sha256}, found [0-9a-f]{{64}}"
    ):
        TokenDataset.open(two_domains.folder)
    TokenDataset.open(two_domains.folder, verify=False)  # sizes only, as asked


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_or_missing_shard_is_refused_by_name(two_domains: TokenDataset, verify: bool) -> None:
    path = two_domains.folder / "a.held_out.00000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    message = rf"a\.held_out\.00000\.bin: expected {len(data)} bytes, found {len(data) - 1}"
    with pytest.raises(ConfigError, match=message):
        TokenDataset.open(two_domains.folder, verify=verify)
    path.unlink()
    with pytest.raises(ConfigError, match=r"a\.held_out\.00000\.bin: missing"):
        TokenDataset.open(two_domains.folder, verify=verify)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"version": 2}, r"manifest\.json: format version 2, this Tidegate reads 1"),
        (lambda content: content | {"dtype": "int8"}, r"manifest\.json: dtype: Input should be"),
        (lambda content: [], r"manifest\.json: format version None"),
    ],
)
def test_a_foreign_manifest_is_refused(
    two_domains: TokenDataset, change: Callable[[dict[str, object]], object], message: str
) -> None:
    path = two_domains.folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=message):
        TokenDataset.open(two_domains.folder)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json: cannot be read"):
        TokenDataset.open(two_domains.folder)
    path.unlink()
    with pytest.raises(ConfigError, match=r"not a prepared dataset, it has no manifest\.json"):
        TokenDataset.open(two_domains.folder)


def test_a_changed_tokenizer_is_refused(two_domains: TokenDataset) -> None:
    (two_domains.folder / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: expected sha256"):
        TokenDataset.open(two_domains.folder, verify=False)


def test_the_jobs_tokenizer_is_compared_with_the_datasets(
    two_domains: TokenDataset, loader_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    config = loader_config({"a": 1, "b": 1})
    check_tokenizer(two_domains, config, job_dir=tmp_path)
    bigger = config.model_copy(update={"tokenizer": TrainedTokenizer(vocab_size=301)})
    with pytest.raises(ConfigError, match=r"data\.tokenizer: the job trains a vocabulary of 301.*vocab_size=300"):
        check_tokenizer(two_domains, bigger, job_dir=tmp_path)

    from_file = config.model_copy(update={"tokenizer": TokenizerFile(kind="file", path="{job}/t.json")})
    (tmp_path / "t.json").write_bytes(b"{}")
    check_tokenizer(two_domains, from_file, job_dir=tmp_path)
    (tmp_path / "t.json").write_bytes(b"[]")
    with pytest.raises(ConfigError, match=rf"t\.json' \(sha256 4f53.*{two_domains.tokenizer_sha256}"):
        check_tokenizer(two_domains, from_file, job_dir=tmp_path)


def test_the_fingerprint_is_that_of_the_content(write_dataset: Callable[..., TokenDataset]) -> None:
    content = {"a": ([[1, 2, 0]], [[3, 0]])}
    first, again = write_dataset(content, "first"), write_dataset(content, "again")
    other = write_dataset({"a": ([[1, 2, 0]], [[4, 0]])}, "other")
    renamed = write_dataset({"z": ([[1, 2, 0]], [[3, 0]])}, "renamed")
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, renamed.fingerprint}) == 3
