"""`tidegate export` on the checkpoints of a run that was really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tidegate import cli
from tidegate.config import ConfigError
from tidegate.train.export import check_files, open_export

FFN = {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 16, "shared": {"num": 1, "gate": True}}


def train(job: Path, state: Path, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "tidegate.cli", "train", str(job), "--local", "--state-dir", str(state)]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None:
        raise result.exception
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

    first = next(state.glob("checkpoints/tiny-1-*/step_00000002-*"))
    run("export", "tiny-1", "--checkpoint", first.name, *where)
    assert (state / "exports" / "tiny-1-step2-tidegate").is_dir()
    mistakes(first.parent, where, ours)


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
    with pytest.raises(ConfigError, match=r"model.safetensors: its content is not what was written"):
        check_files(ours)
    damaged.unlink()
    with pytest.raises(ConfigError, match=r"model.safetensors: is missing, but manifest.json lists it"):
        check_files(ours)

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
