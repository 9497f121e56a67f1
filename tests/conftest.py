"""Fixtures that more than one folder uses: a tiny job on generated text, real process groups, poisoned memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing
import yaml

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is loaded; worker processes inherit it


def tiny_settings(folder: Path) -> dict[str, Any]:
    """A job on two small generated domains that trains a step in well under a second."""
    random.seed(0)
    for name, words in (("letters", "abcdefgh"), ("digits", "0123456789")):
        text = "\n".join("".join(random.choices(words, k=7)) for _ in range(4000))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {
        "name": "tiny",
        "model": {
            "vocab_size": 300,
            "width": 32,
            "num_layers": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 16, "shared": {"num": 1}},
        },
        "balance": {"loss_weight": 0.01, "bias_rate": 0.001},
        "data": {
            "sequence_length": 64,
            "max_document_chars": 500,
            "eval_sequences": 4,
            "tokenizer": {"kind": "train", "vocab_size": 300},
            "domains": [
                {"name": "letters", "paths": ["{job}/letters.txt"], "held_out": 0.1},
                {"name": "digits", "paths": ["{job}/digits.txt"], "held_out": 0.1},
            ],
        },
        "optimizer": {"schedule": {"kind": "cosine", "peak": 3e-3, "warmup_tokens": 512}, "gradient_clip": 0.5},
        "train": {
            "tokens": 6144,
            "batch_tokens": 512,
            "micro_batch": 2,
            "precision": "fp32",
            "log_every": 1,
            "eval_every": 100,
        },
        "checkpoint": {"every": 2},
        "track": {"flush_every_s": 0.2},
    }


class Template(NamedTuple):
    database: Path
    notices: list[str]

    def copy_to(self, state_dir: Path) -> None:
        (state_dir / "mlflow").mkdir(parents=True)
        shutil.copy(self.database, state_dir / "mlflow" / "mlflow.db")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """An MLflow store as its first use leaves it, and what that first use said: to make one takes seconds."""
    from tidegate.track import TrackConfig, open_run
    from tidegate.track.store import embedded_uri

    state_dir = tmp_path_factory.mktemp("template")
    notices: list[str] = []
    config = TrackConfig(experiment="template")
    open_run(embedded_uri(state_dir), config, job="j", resolved={}, changes={}, command=[], notice=notices.append)
    return Template(state_dir / "mlflow" / "mlflow.db", notices)


@pytest.fixture
def tiny_job(tmp_path: Path, template: Template) -> Callable[..., Path]:
    """Write the tiny job, with sections laid over it, and return the file; `state` beside it has an MLflow store."""
    template.copy_to(tmp_path / "state")

    def write(**sections: dict[str, Any]) -> Path:
        folder = tmp_path / "job"
        folder.mkdir(exist_ok=True)
        settings = tiny_settings(folder)
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so a value that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def seeded_single_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def _rank_main(
    rank: int, world_size: int, rendezvous: str, out: str, environment: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    torch.save(function(*args), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`on_ranks(world_size, function, *args)`: call it in that many gloo processes; results in rank order."""
    calls = 0
    # Each rank is a fork of a process that has imported what takes seconds, and has done nothing else.
    multiprocessing.set_forkserver_preload(["tidegate.train.loop", "torch._dynamo"])

    def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        rendezvous, out = tmp_path / f"rendezvous{calls}", tmp_path / f"result{calls}"
        task = (world_size, str(rendezvous), str(out), dict(os.environ), function, args)
        torch.multiprocessing.start_processes(_rank_main, task, nprocs=world_size, start_method="forkserver")
        return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(world_size)]

    return run
