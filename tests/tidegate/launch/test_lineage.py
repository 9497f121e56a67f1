"""From shards to run, checkpoint, export and registered model, in a real store, of a run that was really trained."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate import cli
from tidegate.config import ConfigError, load
from tidegate.data import TokenDataset, prepare
from tidegate.data.loader import scored_fingerprint
from tidegate.launch.lineage import job_tags
from tidegate.launch.state import StateDir
from tidegate.model.flops import total
from tidegate.track.client import connect
from tidegate.train.job import Job


def tidegate(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def extended(job: Path, text: str) -> Path:
    path = job.with_name("child.yaml")
    path.write_text(f"extends: {job.name}\nname: child\n{text}", encoding="utf-8")
    return path


@pytest.mark.slow
def test_mlflow_knows_the_way_from_shards_to_a_registered_model(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    job, state = tiny_job(train={"tokens": 2048}), tmp_path / "state"
    gate = "model: {attention: {gate: {kind: sdpa_output, granularity: headwise}}}"
    child, where = extended(job, gate), ["--state-dir", str(state)]
    train = [sys.executable, "-m", "tidegate.cli", "train", str(child), "--local", *where]
    subprocess.run(train, check=True, timeout=240, capture_output=True)
    handle = StateDir(state).run("child-1").handle()
    client, run_id = connect(handle.uri), handle.run_id
    found = client.get_run(run_id)
    runs = [found.info.experiment_id]

    # Tags, by the filters that docs/mlflow.md gives.
    for wanted in (
        "tags.granularity = 'headwise'",
        "tags.base = 'tiny.yaml' and tags.gpu = 'cpu'",
        "tags.router != 'x'",
    ):
        assert [hit.info.run_id for hit in client.search_runs(runs, wanted)] == [run_id], wanted
    assert not client.search_runs(runs, "tags.gate = 'none'")
    resolved: Job = load(child, Job).config
    cost = total(resolved.model, 64)
    assert found.data.tags["active_params"] == str(cost.active_params)
    assert float(found.data.tags["flops_per_token"]) == pytest.approx(cost.flops_per_token)

    # Datasets, by the shards on disk.
    (folder,) = (state / "data").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    inputs = {(use.dataset.name, use.tags[0].value): use.dataset for use in found.inputs.dataset_inputs}
    assert inputs.keys() == {(name, use) for name in ("letters", "digits") for use in ("training", "validation")}
    held_out = manifest["domains"][1]["held_out"]
    assert (
        hashlib.sha256(held_out["shards"][0]["sha256"].encode())
        .hexdigest()
        .startswith(inputs["digits", "validation"].digest)
    )
    assert json.loads(inputs["digits", "validation"].profile)["tokens"] == held_out["tokens"]

    # A bare checkpoint can be registered; an export takes its place.
    assert "its checkpoint step_00000004" in tidegate("register", "child-1", "--name", "tiny lm", *where)
    tidegate("export", "child-1", *where)
    tidegate("export", "child-1", "--out", str(tmp_path / "again"), *where)
    printed = tidegate("register", "child-1", "--name", "tiny lm", "--alias", "champion", *where)
    assert "its newest export is tiny lm version 2, now tiny lm@champion" in printed
    champion = client.get_model_version_by_alias("tiny lm", "champion")
    export = Path(champion.tags["location"])
    assert champion.run_id == run_id
    assert champion.tags["digest"] == hashlib.sha256((export / "manifest.json").read_bytes()).hexdigest()
    assert (champion.tags["step"], champion.tags["tokens"]) == ("4", "2048")
    (checkpoint,) = state.glob(f"checkpoints/*/{champion.tags['checkpoint']}/manifest.json")
    measured = json.loads(checkpoint.read_text())
    assert measured["step"] == 4
    assert float(champion.tags["val_loss"]) == measured["metrics"]["val/loss"]
    model = client.get_logged_model(champion.tags["model"])
    assert model.source_run_id == run_id
    outputs = client.get_run(run_id).outputs.model_outputs
    assert model.model_id in {output.model_id for output in outputs}
    assert len(outputs) == 3

    mistakes(state, where)


def mistakes(state: Path, where: list[str]) -> None:
    for alias in ("latest", "v3", "a b", ""):
        with pytest.raises(ConfigError, match=f"--alias '{alias}': an alias is of"):
            tidegate("register", "child-1", "--name", "lm", "--alias", alias, *where)
    with pytest.raises(ConfigError, match=r"--name 'a/b': the name of a model has no /"):
        tidegate("register", "child-1", "--name", "a/b", *where)
    with pytest.raises(ConfigError, match="child-2"):
        tidegate("register", "child-2", "--name", "lm", *where)
    for checkpoint in state.glob("checkpoints/*/*/manifest.json"):
        checkpoint.unlink()
    database = state / "mlflow" / "mlflow.db"
    database.rename(database.with_suffix(".away"))
    database.mkdir()  # an unreachable store
    with pytest.raises(ConfigError, match=r"run child-1: sqlite:.*mlflow\.db does not answer or refuses: "):
        tidegate("register", "child-1", "--name", "lm", *where)


def tags_of(job: Path, cache: Path, **changes: Any) -> dict[str, str]:
    config: Job = load(job, Job, [f"{name}={value}" for name, value in changes.items()]).config
    folder = prepare(config.data, cache_dir=cache, job_dir=job.parent)
    return job_tags(config, TokenDataset.open(folder, verify=False), None, "process")


def test_fingerprints_change_with_what_they_stand_for(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    job = tiny_job()
    base = tags_of(job, tmp_path / "a")
    assert tags_of(job, tmp_path / "b") == base, "the same text, prepared elsewhere"
    assert all("." not in name and "/" not in name for name in base)
    assert base["router"] == "softmax_top_k"
    assert base["balance"] == "global_batch"

    def changed(**changes: Any) -> set[str]:
        other = tags_of(job, tmp_path / "a", **changes)
        return {name for name in base if base[name] != other[name]}

    first = tags_of(job, tmp_path / "a", **{"data.eval_sequences": 1})
    assert int(base["scored_bytes"]) == pytest.approx(4 * int(first["scored_bytes"]), rel=0.2)
    assert changed(**{"data.eval_sequences": 3}) == {"validation", "scored_bytes"}
    assert changed(**{"data.documents": "join"}) == {"validation"}
    assert changed(**{"data.domains.0.weight": 3}) == set(), "training text in another mixture"
    assert changed(**{"data.seed": 1}) - {"scored_bytes"} == {"validation", "tokenizer"}
    assert changed(**{"balance.loss_weight": 0}) == {"balance"}
    config: Job = load(job, Job).config
    dataset = TokenDataset.open(prepare(config.data, cache_dir=tmp_path / "a", job_dir=job.parent), verify=False)
    more = config.data.model_copy(update={"eval_sequences": 10**6})  # more than there are: all of them
    assert scored_fingerprint(dataset, more) == scored_fingerprint(
        dataset, config.data.model_copy(update={"eval_sequences": 10**5})
    )
