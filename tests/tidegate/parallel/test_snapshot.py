"""What a snapshot copies: what tensors show at that moment, into memory that stays from one to the next."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch


def snapshot(buffers: dict[tuple[str, int], torch.Tensor], content: Any, name: str = "file") -> Any:
    from tidegate.parallel.snapshot import _Copier

    return _Copier(name, buffers).on_host(content)


def test_a_snapshot_shows_the_moment_and_not_what_comes_after() -> None:
    whole = torch.arange(63.0)
    content = {"whole": whole, "part": whole[60:], "nest": [OrderedDict(a=whole), ("text", 1, None)], "none": whole[:0]}
    taken = snapshot({}, content)
    whole.zero_()
    assert torch.equal(taken["whole"], torch.arange(63.0))
    assert torch.equal(taken["part"], torch.tensor([60.0, 61.0, 62.0]))
    assert taken["part"].untyped_storage().nbytes() == 12, "a view brings no more than it shows"
    assert type(taken["nest"][0]) is OrderedDict
    assert taken["nest"][0]["a"] is taken["whole"], "tied weights are copied once"
    assert taken["nest"][1] == ("text", 1, None)
    assert taken["none"].shape == (0,)


def test_the_next_snapshot_takes_the_same_memory_unless_shapes_change() -> None:
    buffers: dict[tuple[str, int], torch.Tensor] = {}
    weight = torch.nn.Parameter(torch.ones(7, 3))
    first = snapshot(buffers, [weight, torch.zeros(2)])
    with torch.no_grad():
        weight.fill_(2.0)
    second = snapshot(buffers, [weight, torch.zeros(3)])
    assert second[0] is first[0]
    assert not second[0].requires_grad
    assert torch.equal(second[0], torch.full((7, 3), 2.0))
    assert second[1].shape == (3,)
    other = snapshot(buffers, [weight], "another file")
    assert other[0] is not second[0]


def test_a_member_of_an_enum_is_kept_as_its_value() -> None:
    """A class of its own would have to be read again by name, which Python before 3.11.4 writes as code."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    taken = snapshot({}, {"zero_stage": ZeroStageEnum.gradients})
    assert type(taken["zero_stage"]) is int
    assert taken["zero_stage"] == ZeroStageEnum.gradients
