"""Schedules of token mixers: what they stand for, and what is none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.model.decoder import ModelConfig
from tidegate.model.schedule import expand, repeated

KDA = {"kind": "kda", "num_heads": 2, "key_dim": 6, "value_dim": 10}
GAM = {"kind": "gam", "slots": 4}
GMU = {"kind": "gmu"}
UNITS = {"over": ["heads"], "method": {"kind": "random"}}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("kda", "kda"),
        ("3 x kda, 1 x attention", "kda kda kda attention"),
        ("[2 x kda, attention] x 2", "kda kda attention kda kda attention"),
        ("2 x [kda, attention x 2], kda", "kda attention attention kda attention attention kda"),
        (" [ [ a x 2 , b ] x 2 ] x 1,c ", "a a b a a b c"),
        ("2 x a1 x 2", "a1 a1 a1 a1"),
        ("24 x kda , attention", " ".join(["kda"] * 24 + ["attention"])),
    ],
)
def test_a_schedule_stands_for_names(schedule: str, expected: str) -> None:
    assert expand(schedule) == tuple(expected.split())


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        ("", "it ends early"),
        ("3 x", "it ends early"),
        ("3 kda", "'x' is missing behind 3"),
        ("x", "a name or '[' is missing before 'x'"),
        ("[kda", "']' is missing"),
        ("kda]", "']' is not expected there"),
        ("kda kda", "'kda' is not expected there"),
        ("kda,", "it ends early"),
        ("0 x kda", "a number of at least 1 is missing before '0'"),
        ("kda x two", "a number of at least 1 is missing before 'two'"),
        ("kda x", "a number of at least 1 is missing"),
        ("kda; attention", "'; attention' is not part of it"),
        ("99999 x 99999 x kda", "a name or '[' is missing before '99999'"),
        ("[99 x [99 x kda]]", "that is more than 4,096 layers"),
        ("4000 x kda, 97 x attention", "that is more than 4,096 layers"),
        ("[" * 50 + "kda" + "]" * 50, "it has more than 8 brackets in each other"),
    ],
)
def test_what_is_no_schedule_says_why(schedule: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"layers={schedule!r}: {problem}; write it as")):
        expand(schedule)


@given(st.text(alphabet="ab x,[]1290", max_size=40))
def test_any_text_is_a_schedule_or_a_mistake(text: str) -> None:
    try:
        names = expand(text)
    except ValueError:
        return
    assert 1 <= len(names) <= 4096
    assert expand(", ".join(names)) == names


def test_a_pattern_repeats() -> None:
    assert repeated("kda, attention", 6) == ("kda", "attention") * 3
    with pytest.raises(ValueError, match=r"are 2 layers, which do not go into num_layers=5"):
        repeated("kda, attention", 5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": "kda, attention"}, "there is no mixer 'kda'; there are: attention"),
        ({"mixers": {"kda": KDA}}, r"mixers.kda is in no layer \(layers=None\)"),
        ({"layers": "attention", "mixers": {"kda": KDA}}, r"mixers.kda is in no layer \(layers='attention'\)"),
        ({"layers": "attention", "mixers": {"attention": KDA}}, "mixers.attention: that name is model.attention's"),
        (
            {"layers": "unit, kda", "mixers": {"unit": GMU, "kda": KDA}},
            "block 0 is 'unit', a Gated Memory Unit, and no",
        ),
        ({"layers": "bank, unit", "mixers": {"unit": GMU, "bank": GAM}}, "block 1 is 'unit', a Gated Memory Unit"),
        ({"layers": "bank", "mixers": {"bank": {**GAM, "slots": 0}}}, "greater than or equal to 1"),
        ({"layers": "best", "mixers": {"best": {"kind": "dynamic_mask", "keep": 0}}}, "greater than or equal to 1"),
        ({"layers": "x", "mixers": {"x": KDA}}, "should match pattern"),
        ({"layers": "kda, attention", "mixers": {"kda": KDA}, "units": UNITS}, "for models whose blocks are alike"),
    ],
)
def test_layers_and_mixers_belong_together(changes: dict[str, Any], problem: str) -> None:
    sizes = {"vocab_size": 10, "width": 16, "num_layers": 2, "ffn": {"kind": "dense", "hidden_dim": 8}}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    with pytest.raises(ValueError, match=problem):
        ModelConfig.model_validate({**sizes, "attention": heads, **changes})
