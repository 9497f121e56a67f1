"""`tidegate bench` in real processes: what it stores, prints and compares."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tidegate.config import ConfigError, load
from tidegate.launch.bench import BenchResult, bench_job, read_result
from tidegate.model.flops import total
from tidegate.train.job import Job

STEPS = 2


def bench(*arguments: str | Path) -> str:
    """Run the command and return what it prints."""
    command = [sys.executable, "-m", "tidegate.cli", "bench", *map(str, arguments), "--steps", str(STEPS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(printed: str, name: str) -> list[str]:
    (line,) = (line for line in printed.splitlines() if line.startswith("│") and line.split("│")[1].strip() == name)
    return [cell.strip() for cell in line.split("│")[2:-1]]


def check_numbers(result: BenchResult, workers: int) -> None:
    job = Job.model_validate(result.job)
    assert result.hardware.device == "CPU"
    assert result.hardware.count == workers == job.resources.workers
    assert len(result.steps_s) == STEPS
    assert result.step_s == statistics.median(result.steps_s) > 0
    assert result.tokens_per_s * result.step_s == pytest.approx(job.train.batch_tokens)
    assert result.tokens_per_s_per_device * workers == pytest.approx(result.tokens_per_s)
    flops = total(job.model, job.data.sequence_length).flops_per_token * result.tokens_per_s / workers
    assert result.model_tflops_per_device * 1e12 == pytest.approx(flops)
    assert (result.mfu, result.trace, result.memory, result.energy_j_per_token) == (None, None, None, None)
    assert result.energy_missing == "a CPU has no counter"
    assert sum(result.split.model_dump().values()) == pytest.approx(result.step_s, rel=0.3)


@pytest.mark.slow
def test_one_worker_and_two_take_the_same_steps(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    job = tiny_job()
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    bench(job, "--out", one, "--commit", "0123456789abcdef", "--set", "data.seed=5")
    overrides = ("resources.workers=2", "parallel.expert=2", "data.seed=5")
    printed = bench(job, "--out", two, "--against", one, *(part for o in overrides for part in ("--set", o)))

    first, second = read_result(one), read_result(two)
    check_numbers(first, workers=1)
    check_numbers(second, workers=2)
    assert second.losses == pytest.approx(first.losses, rel=1e-4)
    assert (first.commit, first.overrides, second.overrides) == ("0123456789abcdef", ("data.seed=5",), overrides)
    assert Job.model_validate(second.job) == load(job, Job, overrides).config
    assert first.versions["torch"] == torch.__version__

    ratio = second.tokens_per_s / first.tokens_per_s
    assert row(printed, "tokens/s") == [f"{second.tokens_per_s:,.0f}", f"{first.tokens_per_s:,.0f} ({ratio:.3f})"]
    assert f"tiny on 2 x CPU, commit {second.commit[:12]}" in printed
    assert "MFU" not in printed  # nobody measured it
    assert "energy was not measured: a CPU has no counter" in printed


@pytest.mark.slow
def test_waiting_for_experts_is_measured(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    job = tiny_job(train={"precision": "bf16"}, parallel={"offload": "experts"}, model={"num_layers": 3})
    printed = bench(job, "--out", out)
    result = read_result(out)
    waited = result.split.experts_s
    assert 0 < waited < result.step_s
    assert sum(result.split.model_dump().values()) == pytest.approx(result.step_s, rel=0.3)
    assert row(printed, "waiting for experts") == [f"{1e3 * waited:,.2f} ms"]
    assert row(printed, "of the step") == [f"{waited / result.step_s:.1%}"]


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"kind": "tidegate bench"}', "[1]"])
def test_what_is_no_result_is_refused_by_name(tiny_job: Callable[..., Path], tmp_path: Path, content: str) -> None:
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content, encoding="utf-8")
    what = "cannot be read" if content is None else "not a result of tidegate bench"
    with pytest.raises(ConfigError, match=rf"^--against {other}: {what} \(.*\)$"):
        bench_job(tiny_job(), [], steps=1, out=None, against=[other], commit=None)


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        ([], {"steps": 0}, "--steps 0: needs at least one"),
        ([], {"out": Path("gone/x.json")}, "--out gone/x.json: .*gone is not a folder"),
        (
            ["resources.gpu=true", "resources.workers=2", "parallel.expert=2"],
            {},
            "resources.workers=2 needs as many GPUs, this machine has 1",
        ),
        (
            ["train.precision=bf16", "parallel.offload=experts", "parallel.offload_folder=/gone"],
            {},
            "parallel.offload_folder=/gone is not a folder that can be written to on this machine; make it or name",
        ),
        (["model.width=7"], {}, "--set model.width=7: model.width: .* multiple of 8"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(
    tiny_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, overrides: list[str], options: dict, expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    defaults = {"steps": 1, "out": None, "against": [], "commit": None}
    with pytest.raises(ConfigError, match=f"^{expected}"):
        bench_job(tiny_job(), overrides, **(defaults | options))


def test_a_full_disk_is_refused_before_experts_go_to_it(
    tiny_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = 2 * 4 * 3 * 32 * 16  # layers, experts, matrices
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * experts - 1))
    overrides = ["train.precision=bf16", "parallel.offload=experts", f"parallel.offload_folder={tmp_path}"]
    with pytest.raises(ConfigError, match=f"^parallel.offload_folder={tmp_path}: no space left for master weights"):
        bench_job(tiny_job(), overrides, steps=1, out=None, against=[], commit=None)
