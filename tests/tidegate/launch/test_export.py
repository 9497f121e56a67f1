"""`tidegate export` on the checkpoints of a run that was really trained."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tidegate import cli
from tidegate.config import ConfigError, load
from tidegate.model.decoder import DenseConfig, ModelConfig
from tidegate.model.weights import ALL, Spec, Weights, specs_of
from tidegate.train.export import Origin, open_export, write_export
from tidegate.train.init_from import starting_weights
from tidegate.train.job import Job

FFN = {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 16, "shared": {"num": 1, "gate": True}}


def train(job: Path, state: Path, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "tidegate.cli", "train", str(job), "--local", "--state-dir", str(state)]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.slow
def test_a_run_goes_out_in_both_formats(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    state, job = tmp_path / "state", tiny_job(model={"ffn": FFN}, balance={"bias_rate": 0.0}, train={"tokens": 2048})
    train(job, state)
    where: Any = ["--state-dir", str(state)]
    printed = run("export", "tiny-1", *where)
    ours = state / "exports" / "tiny-1-step4-tidegate"
    assert "every number" in printed
    assert "2 x 4" in printed  # experts
    model, weights = open_export(ours)
    manifest = json.loads((ours / "manifest.json").read_text())
    assert manifest["origin"]["step"] == 4
    assert f"{manifest['parameters']:,} in float32" in printed
    assert manifest["model"] == model.model_dump(mode="json")

    run("export", "tiny-1", "--format", "hf", "--out", str(tmp_path / "hf"), *where)
    assert run("verify", str(tmp_path / "hf")) == "hf: every file is what was written\n"
    _, again = open_export(tmp_path / "hf")
    for name in weights.specs:
        torch.testing.assert_close(again.read(name), weights.read(name), rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("abcdefg", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "abcdefg"
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert there.config.eos_token_id == tokenizer.eos_token_id == 0
    nll = there(ids, labels=ids).loss
    assert nll < torch.tensor(300.0).log()  # it has learned something

    likeliest = ids
    for _ in range(9):
        likeliest = torch.cat([likeliest, there(likeliest).logits[:, -1:].argmax(dim=-1)], dim=1)
    ask: Any = ["generate", "tiny-1", "--prompt", "abcdefg", "--tokens", "9", *where]
    assert run(*ask) == tokenizer.decode(likeliest[0]) + "\n"
    drawn = [run(*ask, "--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert run("generate", "tiny-1", "--tokens", "1", *where).startswith("<|endoftext|>")
    for option, value, problem in (
        ("--tokens", "0", "--tokens 0: must be at least 1"),
        ("--temperature", "-1", "--temperature -1: must be a number from 0 on"),
        ("--checkpoint", "no", "--checkpoint no: no such checkpoint of tiny-1"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run(*ask, option, value)

    first = next(state.glob("checkpoints/tiny-1-*/step_00000002-*"))
    run("export", "tiny-1", "--checkpoint", first.name, *where)
    assert (state / "exports" / "tiny-1-step2-tidegate").is_dir()
    mistakes(first.parent, where, ours)


DENSE = {"kind": "dense", "hidden_dim": 40}
COPIES = {"kind": "moe", "num_experts": 6, "top_k": 2, "expert_dim": 40}


def first_loss(state: Path, run: str) -> float:
    record = json.loads((state / "runs" / run / "run.json").read_text())
    with closing(sqlite3.connect(state / "mlflow" / "mlflow.db")) as store:
        query = "select value from metrics where run_uuid = ? and key = 'train/loss' and step = 1"
        (loss,) = store.execute(query, (record["run_id"],)).fetchone()
    return float(loss)


@pytest.mark.slow
def test_runs_begin_with_exported_weights(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    where: Any = ["--state-dir", str(state)]
    plain: Any = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "gate": {"kind": "none"}}
    dense = tiny_job(model={"ffn": DENSE, "attention": plain}, balance={"bias_rate": 0.0, "loss_weight": 0.0})
    train(dense, state, "--set", "train.tokens=2048")
    ours, theirs = tmp_path / "ours", tmp_path / "hf"
    run("export", "tiny-1", "--out", str(ours), *where)
    run("export", "tiny-1", "--format", "hf", "--out", str(theirs), *where)

    stop = ["--set", "train.tokens=1024"]
    printed = train(dense, state, "--init-from", str(ours), *stop)
    assert f"begins with the weights of {ours}" in printed
    upcycled = tiny_job(model={"ffn": COPIES, "attention": plain})
    (theirs / "manifest.json").unlink()  # as what comes from the hub
    train(upcycled, state, "--set", 'train.init_from="{job}/../hf"', *stop)
    begun, copied = (first_loss(state, f"tiny-{number}") for number in (2, 3))
    assert begun < first_loss(state, "tiny-1") - 0.1  # it goes on where the other stopped
    assert copied == pytest.approx(begun, abs=1e-5)

    # Resuming needs the folder no more.
    ours.rename(tmp_path / "gone")
    train_again = [sys.executable, "-m", "tidegate.cli", "train", "--resume", "tiny-2", "--local", *where]
    with pytest.raises(ConfigError, match=r"is for a new run; --resume tiny-2 goes on with its own weights"):
        run("train", "--resume", "tiny-2", "--init-from", str(theirs), "--local", *where)
    longer = ["--set", "train.tokens=1536"]
    ended = subprocess.run([*train_again, *longer], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "step 3/3" in ended.stdout


def test_weights_that_do_not_fit_are_refused_before_anything_starts(
    tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    job, folder = str(tiny_job()), tmp_path / "weights"
    where: Any = ["--local", "--state-dir", str(tmp_path / "state")]
    config = load(job, Job).config.model

    def refused(match: str, *arguments: str) -> None:
        with pytest.raises(ConfigError, match=match):
            run("train", job, "--init-from", str(folder), *arguments, *where)

    refused(r"weights: there is no such folder")
    write_model(folder, config)
    refused(
        r"train.init_from=.*weights holds a model with model.norm_eps=1e-06 .the job has 1e-05.; set",
        "--set",
        "model.norm_eps=1e-5",
    )
    refused(r"train.upcycle_noise=0.1, but .* has experts already; set it to 0", "--set", "train.upcycle_noise=0.1")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    refused(r"model.safetensors: its content is not what was written")
    with pytest.raises(ConfigError, match=r"train.upcycle_noise=0.1 is for experts that are copies"):
        run("train", job, "--set", "train.upcycle_noise=0.1", *where)

    dense = config.model_copy(update={"ffn": DenseConfig(hidden_dim=16)})
    folder = tmp_path / "dense"
    write_model(folder, dense)
    refused(r"holds a dense model: model.ffn.shared.num=1 adds to experts .* set it to 0")
    assert not (tmp_path / "state" / "runs").exists()

    copies = str(tiny_job(model={"ffn": {**COPIES, "expert_dim": 16}}))
    settings = [f"train.init_from={folder}", "train.upcycle_noise=0.1"]
    weights = starting_weights(load(copies, Job, settings).config)
    assert weights is not None
    w1 = weights.read("blocks.1.ffn.experts.w1")
    assert float((w1 - w1.mean(dim=0)).std()) == pytest.approx(0.1 * float(w1.std()), rel=0.2)


def test_a_run_on_longer_sequences_stretches_the_positions(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    job, folder = tiny_job(), tmp_path / "weights"
    write_model(folder, load(job, Job).config.model)
    longer = [f"train.init_from={folder}", "data.sequence_length=256", "train.batch_tokens=512"]
    stretched = ["model.attention={rope_theta: 1.0e+6, yarn: {factor: 4, trained_length: 64}}"]
    assert starting_weights(load(job, Job, [*longer, *stretched]).config) is not None
    with pytest.raises(ConfigError, match=r"holds a model with model.attention.softmax=plain"):
        starting_weights(load(job, Job, [*longer, *stretched, "model.attention.softmax=off_by_one"]).config)


def write_model(folder: Path, config: ModelConfig) -> None:
    """An export of numbers from -1 to 1."""
    origin = Origin(run="r", checkpoint="c", step=1, tokens=2)
    write_export(folder, Ramps(config), config, format="tidegate", origin=origin, version="0", max_positions=9)


class Ramps(Weights):
    def __init__(self, config: ModelConfig) -> None:
        self._specs = specs_of(config)

    @property
    def specs(self) -> dict[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        shape, dtype, _ = self._specs[name]
        return torch.linspace(-1, 1, prod(shape)).view(shape).to(dtype)[rows if rows != ALL else ...]


def mistakes(checkpoints: Path, where: list[str], ours: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*tidegate: exists"):
        run("export", "tiny-1", *where)
    with pytest.raises(ConfigError, match=r"--format onnx: unknown, one of tidegate, hf"):
        run("export", "tiny-1", "--format", "onnx", *where)
    with pytest.raises(ConfigError, match=r"--checkpoint nine: no such checkpoint of tiny-1; there are: step_"):
        run("export", "tiny-1", "--checkpoint", "nine", *where)

    damaged = ours / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    open_export(ours)  # looks at names and shapes only
    printed = run("verify", str(ours), status=1)
    assert "model.safetensors: its content is not what was written" in printed
    damaged.unlink()
    assert "model.safetensors: is missing, but manifest.json lists it" in run("verify", str(ours), status=1)

    newest = sorted(checkpoints.glob("step_*"))[-1]
    expert = newest / "state" / "layer_1_expert_2_mp_rank_00_model_states.pt"
    content = bytearray(expert.read_bytes())
    content[-200] ^= 1
    expert.write_bytes(content)
    out = ["--out", str(ours.parent / "new")]
    with pytest.raises(ConfigError, match=r"layer_1_expert_2_mp_rank_00_model_states.pt: its content is not what"):
        run("export", "tiny-1", *out, *where)
    expert.unlink()
    with pytest.raises(ConfigError, match=r"layer_1_expert_2_mp_rank_00_model_states.pt: is missing"):
        run("export", "tiny-1", "--checkpoint", newest.name, *out, *where)
    assert not [left for left in ours.parent.iterdir() if "new" in left.name]
