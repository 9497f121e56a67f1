"""CUDA takes 65,535 programs along the second axis of a grid, where a kernel has one: what has more is refused.

The interpreter has no such limit, so what is launched is looked at, not run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tidegate_kernels.choice import chosen
from tidegate_kernels.gated_attention import Documents, gated_attention
from tidegate_kernels.gated_output import gated_output
from tidegate_kernels.gated_output import triton as gate
from tidegate_kernels.qk_norm_rope import qk_norm_rope
from tidegate_kernels.router_topk import router_topk
from tidegate_kernels.tiles import MOST_PROGRAMS

MANY = MOST_PROGRAMS + 1


def _gate(x: torch.Tensor) -> torch.Tensor:
    return gated_output(x, x, activation="sigmoid", form="multiplicative", shared=False)


def _attend(x: torch.Tensor) -> torch.Tensor:
    heads = x.view(2, 1, -1, 2)  # sequences times heads
    return gated_attention(heads, heads, heads, None, documents=Documents(torch.zeros(2, 1, dtype=torch.int64)))


def _route(x: torch.Tensor) -> torch.Tensor:
    counted = torch.ones(MANY, 1, dtype=torch.bool)
    options = {"top_k": 1, "score": "softmax", "renormalize": True, "scale": 1.0, "signals": False}
    return router_topk(x.view(-1, 2), torch.zeros(2), counted, **options).weights_NK


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gated_output": _gate,
    "gated_attention": _attend,
    "qk_norm_rope": lambda x: qk_norm_rope(x, x, None, None, torch.ones(1, 1), torch.zeros(1, 1), 1e-6).q_BTHd,
    "router_topk": _route,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_too_many_sequences_are_refused(operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(MANY, 1, 1, 2)
    with chosen("triton"), pytest.raises(ValueError, match="no kernel takes"):
        operation(x)
    with chosen("reference"):
        assert operation(x).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 131_072, 1, 4096), (1, 131_072, 16, 8192), (1, 1, 131_072, 64)])
def test_a_gate_takes_long_sequences(shape: tuple[int, ...]) -> None:
    grid, _ = gate._launch(torch.empty(shape, device="meta"))
    assert max(grid[1:]) <= MOST_PROGRAMS
