"""A found job says the same from another folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tidegate.config import load
from tidegate.data.sources import expand
from tidegate.train.job import Job
from tidegate.tune.found import write_found

GATE = {"kind": "value", "granularity": "headwise"}
CHANGES = {
    "model.attention.gate": GATE,
    "model.attention.gate.activation": "silu",
    "model.units": {"over": ["heads"], "keep": 0.5, "method": {"kind": "random"}},
    "data.domains.1.weight": 0.25,
    "optimizer.schedule": {"kind": "wsd", "peak": 3e-4, "decay_tokens": 512},
    "balance.scope": "sequence",
}


@pytest.mark.parametrize("place", ["found.yaml", "found/a.yaml", "../elsewhere/a/b.yaml"])
def test_what_is_written_is_the_job_wherever_it_stands(tiny_job: Callable[..., Path], place: str) -> None:
    base = tiny_job()
    job = load(base, Job, [f"{path}={json.dumps(value)}" for path, value in CHANGES.items()]).config
    file = base.parent / place
    write_found(file, base, job, "The best.")
    found = load(file, Job).config
    assert found.model_dump(exclude={"data"}) == job.model_dump(exclude={"data"})
    assert found.data.domains[1].weight == 0.25
    assert file.read_text().startswith("# The best.\nextends: ")
    for domain in found.data.domains:
        assert [Path(expand(path, file.parent)).resolve() for path in domain.paths] == [
            base.parent / f"{domain.name}.txt"
        ]
    assert (found == job) == (file.parent == base.parent)


def test_only_what_changed_is_written(tiny_job: Callable[..., Path]) -> None:
    base = tiny_job()
    job = load(base, Job, ["model.ffn.top_k=3", "model.attention.gate={kind: value}"]).config
    write_found(base.with_name("b.yaml"), base, job, "x")
    written = yaml.safe_load(base.with_name("b.yaml").read_text())
    assert set(written) == {"extends", "model"}
    assert set(written["model"]) == {"attention", "ffn"}
    assert written["model"]["ffn"] == {"top_k": 3}
    assert written["model"]["attention"]["gate"]["kind"] == "value"
