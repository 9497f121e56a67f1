"""`tidegate list`: everything that a job can choose from, with a line that works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch.listing import list_choices
from tidegate.launch.show import show_job
from tidegate.model.balance import BalanceConfig
from tidegate.model.catalogue import SUBJECTS, Choice, choices
from tidegate.model.gates import AttentionGate
from tidegate.model.mixers import MixerConfig
from tidegate.model.routers import RouterConfig
from tidegate.model.unit_gates import UnitMethod
from tidegate.train.job import Job

DEMO = Path(__file__).resolve().parents[3] / "jobs" / "demo.yaml"
EVERY = [(subject, choice) for subject in SUBJECTS for choice in choices(subject)]

NEEDED = {  # other fields of the demo that must give way
    "uneven experts": ["model.ffn.num_experts=6", "parallel.expert=1"],
    "budget": ["model.ffn.sizes=[{num: 4, times: 2}, {num: 4, times: 0}]"],
}


def override(choice: Choice) -> str:
    field, _, value = choice.yaml.partition(": ")
    return f"{field}={value}"


@pytest.mark.parametrize(("subject", "choice"), EVERY, ids=[f"{s}-{c.name}" for s, c in EVERY])
def test_every_line_works_in_a_job(subject: str, choice: Choice, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*NEEDED.get(choice.name, []), override(choice)]
    assert isinstance(load(DEMO, Job, overrides).config, Job)
    show_job(DEMO, overrides)
    assert "layout:" in capsys.readouterr().out
    assert len(choice.summary) > 10
    assert re.search(r"\d{4}|V4", choice.source) or choice.source.startswith("forced"), choice.source


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_choice_is_printed_once(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    list_choices(subject)
    printed = capsys.readouterr().out
    names = [choice.name for choice in choices(subject)]  # type: ignore[arg-type]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.search(rf"^│ {re.escape(name)} +│", printed, re.MULTILINE), name


def kinds(union: Any) -> set[str]:
    return {variant.model_fields["kind"].default for variant in get_args(get_args(union)[0])}


def test_nothing_is_left_out() -> None:
    listed = {subject: {choice.name for choice in choices(subject)} for subject in SUBJECTS}
    assert kinds(RouterConfig) <= listed["routers"]
    assert kinds(UnitMethod) | set(get_args(AttentionGate.model_fields["kind"].annotation)) <= listed["gates"]
    assert kinds(MixerConfig) == listed["mixers"]
    assert set(get_args(BalanceConfig.model_fields["scope"].annotation)) <= listed["balance"]


def test_an_unknown_subject_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="list optimizers: unknown, one of routers, gates, mixers, balance"):
        list_choices("optimizers")
