"""A real chain that prunes, on a local Ray: killed in a round, resumed, and looked at."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate.config import ConfigError, load
from tidegate.launch.export import open_checkpoint
from tidegate.launch.state import StateDir
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.export import open_export
from tidegate.train.job import Job
from tidegate.train.masks import MaskFile
from tidegate.train.storage import Storage
from tidegate.tune.prune import PruneRequest, prune_in_rounds

REWIND = 4 * 512


def results(state: StateDir) -> dict[int, dict[str, Any]]:
    files = (state.root / "prunes" / "tiny-1" / "trials").glob("[0-9]*.json")
    return {document["trial"]["number"]: document for document in (json.loads(file.read_text()) for file in files)}


def store_of(state: StateDir, run: str) -> CheckpointStore:
    return CheckpointStore(Storage(state.run(run).read().checkpoints))


@pytest.mark.ray
@pytest.mark.slow
def test_a_chain_that_was_killed_in_a_round_goes_on_and_its_runs_are_what_the_method_says(
    sweeps: Any, tiny_job: Callable[..., Path]
) -> None:
    job = tiny_job(
        prune={"over": ["attention", "experts"], "keep": 0.3, "rounds": 1, "rewind_tokens": REWIND},
        train={"tokens": 40 * 512, "log_every": 10},
        checkpoint={"every": 3},
    )
    state = StateDir(sweeps.state)

    def in_the_round() -> bool:
        run = results(state).get(1, {}).get("run")
        return bool(run) and bool(store_of(state, run).valid())

    sweeps.kill_at(in_the_round, "prune", str(job))
    before = results(state)
    assert [before[number]["status"] for number in (0, 1)] == ["finished", "running"]
    first = store_of(state, before[1]["run"]).valid()[-1]
    assert REWIND < first.manifest.tokens < 40 * 512

    again = sweeps.command("prune", "--resume", "tiny-1")
    done = subprocess.run(again, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    after = results(state)
    assert after[0] == before[0]
    assert after[1]["run"] == before[1]["run"], "the round was begun anew"
    assert f"the newest is of step {first.step}" in done.stdout
    assert [after[number]["status"] for number in range(3)] == ["finished"] * 3

    folder = state.root / "prunes" / "tiny-1"
    masks = MaskFile(folder / "masks" / "round_01.safetensors")
    total = sum(masks.read(name).numel() for name in masks.specs)
    assert (masks.kept, masks.problem()) == (int(0.3 * total + 0.5), None)
    assert not any("shared_experts" in name for name in masks.specs)

    dense, control = after[0]["run"], after[2]["run"]
    point = [e for e in store_of(state, dense).valid() if e.manifest and e.manifest.tokens == REWIND]
    there, (_, rewound) = open_checkpoint(dense, state, point[0].name).weights, open_export(folder / "rewind")
    assert all(torch.equal(there.read(name), rewound.read(name)) for name in there.specs)
    for run in (after[1]["run"], control):
        weights = open_checkpoint(run, state).weights
        assert all((weights.read(name)[~masks.read(name)] == 0).all() for name in masks.specs)
        assert all((weights.read(name)[masks.read(name)] != 0).any() for name in masks.specs)
    jobs = {run: json.loads(state.run(run).job_file.read_text())["train"] for run in (after[1]["run"], control)}
    assert jobs[control]["mask"] == jobs[after[1]["run"]]["mask"]
    assert (jobs[control]["seed"], jobs[control]["init_from"], jobs[control]["from_tokens"]) == (1, None, 0)

    report = (folder / "report.md").read_text()
    assert f"{100 * masks.kept / total:.2f} %" in report
    assert all(f"{result['value']:.4f}" in report for result in after.values())
    assert (folder / "pruning.png").stat().st_size > 5000


def test_a_chain_that_has_nothing_to_do_says_so(tmp_path: Path, tiny_job: Callable[..., Path]) -> None:
    state = StateDir(tmp_path / "state")
    with pytest.raises(ConfigError, match=r"tiny.yaml: has no prune: section"):
        prune_in_rounds(PruneRequest(tiny_job(), [], state))
    with pytest.raises(ConfigError, match=r"tiny-7: no such sweep in .*prunes; there are: none"):
        prune_in_rounds(PruneRequest(None, [], state, resume="tiny-7"))


def test_every_round_keeps_its_share_of_what_was_left(tiny_job: Callable[..., Path]) -> None:
    config = load(tiny_job(prune={"keep": 0.8, "rounds": 9, "rewind_tokens": 0}), Job).config.prune
    kept = [config.kept(1001, number) for number in range(10)]
    assert kept == [1001, 801, 641, 513, 410, 328, 262, 210, 168, 134]
    assert config.kept(3, 9) == 1
