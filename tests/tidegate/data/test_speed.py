"""Speeds are of the job's own text and batches: what was counted is what training reads."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tidegate.data.build import prepare
from tidegate.data.loader import TrainLoader
from tidegate.data.shards import TokenDataset
from tidegate.data.speed import loading_speed, tokenizing_speed


@pytest.fixture
def dataset(make_config, tmp_path) -> TokenDataset:
    return TokenDataset.open(prepare(make_config(), cache_dir=tmp_path / "cache", job_dir=tmp_path))


@pytest.mark.parametrize("parallelism", [None, "true"])
def test_tokenizing_encodes_the_training_text_on_one_core(parallelism, dataset, make_config, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if parallelism is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
    threads, began = threading.active_count(), time.perf_counter()
    speed = tokenizing_speed(dataset, make_config(), job_dir=tmp_path, passes=3)
    elapsed = time.perf_counter() - began
    assert speed.sample_tokens == sum(domain.train.tokens for domain in dataset.manifest.domains)
    train_bytes = sum(path.stat().st_size for path in (tmp_path / "text").rglob("*.txt"))
    assert 0.8 * train_bytes < speed.sample_bytes < train_bytes, "a tenth of the documents is held out"
    assert speed.tokens_per_s > speed.sample_tokens / elapsed, "a pass takes less than all of them and the reading"
    assert speed.bytes_per_s / speed.tokens_per_s == pytest.approx(speed.sample_bytes / speed.sample_tokens)
    assert threading.active_count() == threads
    assert os.environ.get("TOKENIZERS_PARALLELISM") == parallelism


def test_loading_counts_the_tokens_of_this_rank(dataset, make_config, monkeypatch):
    step_s, handed_out = 0.01, []
    load = TrainLoader.__next__

    def slow(loader: TrainLoader):  # type: ignore[no-untyped-def]
        time.sleep(step_s)
        handed_out.append(load(loader))
        return handed_out[-1]

    monkeypatch.setattr(TrainLoader, "__next__", slow)
    threads = threading.active_count()
    rate = loading_speed(dataset, make_config(), global_batch=12, micro_batch=2, world_size=3, seconds=0.1, passes=3)
    step_tokens = 2 * 2 * 16  # accumulation, micro-batch, sequence length
    assert {batch.loss_mask_MBT.numel() for batch in handed_out} == {step_tokens}
    assert 0.5 * step_tokens / step_s < rate <= step_tokens / step_s
    assert threading.active_count() == threads, "the reading thread has ended"
