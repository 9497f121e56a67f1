from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tidegate.config import ConfigError
from tidegate.data.build import prepare
from tidegate.data.config import DataConfig, DomainConfig, TokenizerFile, TrainedTokenizer
from tidegate.data.shards import TokenDataset, check_tokenizer

MakeConfig = Callable[..., DataConfig]
DEMO = Path(__file__).parents[3] / "jobs" / "data" / "demo"


def decode(dataset: TokenDataset, domain: int, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(dataset.folder / "tokenizer.json"))
    stream = dataset.stream(domain, split)
    documents: list[list[int]] = [[]]
    for token in stream.read(0, len(stream)).tolist():
        if token == dataset.eot_id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == [], "the last document ends with an end of text too"
    return [tokenizer.decode(document) for document in documents]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_the_shards_hold_the_text(make_config: MakeConfig, tmp_path: Path) -> None:
    dataset = TokenDataset.open(prepare(make_config(), cache_dir=tmp_path / "cache", job_dir=tmp_path))
    assert dataset.domains == ("a", "b")
    for index, name in enumerate(dataset.domains):
        texts = {path.read_text() for path in (tmp_path / "text" / name).glob("*.txt")}
        train, held_out = decode(dataset, index, "train"), decode(dataset, index, "held_out")
        assert set(train) | set(held_out) == texts
        assert (len(train), len(held_out)) == (27, 3)
        manifest = dataset.manifest.domains[index]
        assert (manifest.train.documents, manifest.held_out.documents) == (27, 3)
        assert manifest.train.tokens == len(dataset.stream(index, "train"))
        assert (manifest.source.files, manifest.source.bytes) == (30, sum(len(text) for text in texts))
    file_hash = hashlib.sha256((dataset.folder / "tokenizer.json").read_bytes()).hexdigest()
    assert dataset.tokenizer_sha256 == file_hash
    assert dataset.vocab_size == 300


def test_a_second_call_reuses_the_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    stages: list[str] = []
    cache = tmp_path / "cache"
    folder = prepare(
        config, cache_dir=cache, job_dir=tmp_path, progress=lambda stage, done, total: stages.append(stage)
    )
    assert {"read a", "train tokenizer", "encode b held_out"} <= set(stages)
    before = snapshot(folder)
    stages.clear()
    # A new mtime is no new text, and how tokens are used is no new request.
    os.utime(tmp_path / "text" / "a" / "00.txt")
    used_otherwise = config.model_copy(update={"sequence_length": 8, "documents": "join", "eval_sequences": 1})
    for request in (config, used_otherwise):
        progress = lambda stage, done, total: stages.append(stage)  # noqa: E731
        assert prepare(request, cache_dir=cache, job_dir=tmp_path, progress=progress) == folder
    assert stages == []
    assert snapshot(folder) == before


@pytest.mark.parametrize("change", ["text", "name", "seed", "cut", "vocab", "held_out"])
def test_whatever_changes_the_tokens_makes_another_folder(change: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    cache = tmp_path / "cache"
    folder = prepare(config, cache_dir=cache, job_dir=tmp_path)
    path = tmp_path / "text" / "a" / "00.txt"
    if change == "text":
        path.write_text(path.read_text().replace("a1", "a2"))
    elif change == "name":
        path.rename(path.with_name("99.txt"))
    elif change == "held_out":
        domains = (config.domains[0].model_copy(update={"held_out": 0.2}), config.domains[1])
        config = config.model_copy(update={"domains": domains})
    else:
        updates = {
            "seed": {"seed": 1},
            "cut": {"max_document_chars": 50},
            "vocab": {"tokenizer": TrainedTokenizer(vocab_size=299)},
        }
        config = config.model_copy(update=updates[change])
    other = prepare(config, cache_dir=cache, job_dir=tmp_path)
    assert other != folder
    if change != "name":
        assert TokenDataset.open(other).fingerprint != TokenDataset.open(folder).fingerprint


def test_two_builds_agree_to_the_byte(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    one, two = (prepare(config, cache_dir=tmp_path / name, job_dir=tmp_path) for name in ("one", "two"))
    assert one.name == two.name
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_builders_that_race_end_with_one_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(prepare, config, cache_dir=cache, job_dir=tmp_path) for _ in range(3)]
        folders = {run.result() for run in runs}
    assert list(cache.iterdir()) == [*folders]
    TokenDataset.open(*folders)


def test_a_tokenizer_file_is_used_as_it_is(make_config: MakeConfig, tmp_path: Path) -> None:
    first = TokenDataset.open(prepare(make_config(), cache_dir=tmp_path / "cache", job_dir=tmp_path))
    shutil.copy(first.folder / "tokenizer.json", tmp_path / "t.json")
    config = make_config(tokenizer=TokenizerFile(kind="file", path="{job}/t.json"))
    second = TokenDataset.open(prepare(config, cache_dir=tmp_path / "cache", job_dir=tmp_path))
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint
    check_tokenizer(second, config, job_dir=tmp_path)

    without = json.loads((tmp_path / "t.json").read_text().replace("<|endoftext|>", "<|end|>"))
    (tmp_path / "t.json").write_text(json.dumps(without))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path: '\{job\}/t\.json': has no <\|endoftext\|>"):
        prepare(config, cache_dir=tmp_path / "cache", job_dir=tmp_path)
    with pytest.raises(ConfigError, match="is not the tokenizer of the dataset"):
        check_tokenizer(second, config, job_dir=tmp_path)


def test_too_little_held_out_text_is_an_error_for_a_new_build_and_for_a_reused_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(sequence_length=1000)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"data\.domains\.a: its held_out split has \d+ tokens, .* takes 1001"):
            prepare(config, cache_dir=tmp_path / "cache", job_dir=tmp_path)


def test_an_error_leaves_nothing_behind(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "text" / "b" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad\.txt: not UTF-8: byte 0 is 0xff"):
        prepare(config, cache_dir=tmp_path / "cache", job_dir=tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "b.train.00000.bin":
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match=f"{cache}: no space left for the token shards"):
        prepare(config, cache_dir=cache, job_dir=tmp_path)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    with pytest.raises(ConfigError, match=f"{tmp_path}/cache: cannot write the token shards"):
        prepare(make_config(), cache_dir=tmp_path / "cache", job_dir=tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from tidegate.data.build import prepare
from tidegate.data.config import DataConfig

def die_halfway(stage, done, total):
    if stage == "encode b train":
        os.kill(os.getpid(), signal.SIGKILL)

config = DataConfig.model_validate_json(sys.argv[1])
prepare(config, cache_dir=Path(sys.argv[2]), job_dir=Path(sys.argv[3]), progress=die_halfway)
"""


def test_a_killed_build_leaves_no_folder_that_opens(make_config: MakeConfig, tmp_path: Path) -> None:
    config, cache = make_config(), tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(cache), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (leftover,) = cache.iterdir()
    assert (leftover / "a.train.00000.bin").exists(), "killed in the middle"
    with pytest.raises(ConfigError, match="not a prepared dataset"):
        TokenDataset.open(leftover)
    folder = prepare(config, cache_dir=cache, job_dir=tmp_path)
    TokenDataset.open(folder)
    assert leftover.exists(), "its builder could still be alive"

    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (two_days_ago, two_days_ago))
    prepare(config.model_copy(update={"seed": 1}), cache_dir=cache, job_dir=tmp_path)
    assert not leftover.exists()


def test_a_folder_without_a_manifest_is_not_written_over(make_config: MakeConfig, tmp_path: Path) -> None:
    config, cache = make_config(), tmp_path / "cache"
    folder = prepare(config, cache_dir=cache, job_dir=tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"exists but has no manifest\.json; delete it"):
        prepare(config, cache_dir=cache, job_dir=tmp_path)
    assert list(cache.iterdir()) == [folder]


def test_the_demo_corpus_prepares_to_known_documents(tmp_path: Path) -> None:
    names = ("prose", "math", "multilingual")
    config = DataConfig(
        domains=tuple(DomainConfig(name=name, paths=(f"{{job}}/{name}.jsonl.xz",)) for name in names),
        tokenizer=TrainedTokenizer(vocab_size=512),
        sequence_length=256,
        max_document_chars=4000,
    )
    dataset = TokenDataset.open(prepare(config, cache_dir=tmp_path, job_dir=DEMO))
    counts = [(domain.train.documents, domain.held_out.documents) for domain in dataset.manifest.domains]
    assert counts == [(361, 7), (197, 4), (92, 2)]
    chars = [
        sum(len(text) for split in ("train", "held_out") for text in decode(dataset, index, split))
        for index in range(3)
    ]
    assert chars == [1_247_508, 598_695, 310_064]
