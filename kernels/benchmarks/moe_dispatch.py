"""The ways of `moe_dispatch`: rows to their experts, and the weighted sum back.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.choice import chosen
from tidegate_kernels.moe_dispatch import Slots, combine, fan_out, place


def cases() -> Iterator[Case]:
    for T, D, E, K in ((16384, 2048, 64, 8), (32768, 1024, 32, 4), (10007, 1544, 60, 6)):
        yield _fan_out(T, D, E, K)
        yield _combine(T, D, E, K)


def _slots(T: int, E: int, K: int) -> Slots:
    return place(torch.rand(T, E, device="cuda").topk(K, dim=1).indices.flatten(), E, per_row=K)


def _fan_out(T: int, D: int, E: int, K: int) -> Case:
    def inputs() -> tuple[torch.Tensor, ...]:
        slots = _slots(T, E, K)
        x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
        return x, slots.slot_A, slots.ends_E, torch.randn(T * K, D, device="cuda", dtype=torch.bfloat16)

    def ours(x: torch.Tensor, slot_A: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        return fan_out(x, Slots(slot_A, ends_E, None, K))

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        with chosen("reference"):
            return ours(*arguments)

    floor = Floor(bytes=2 * 2 * (T * D + T * K * D))
    shape = {"direction": "fan_out", "T": T, "D": D, "E": E, "K": K}
    return Case("moe_dispatch", shape, floor, inputs, {"triton": ours, "reference": reference}, target=1.2)


def _combine(T: int, D: int, E: int, K: int) -> Case:
    def inputs() -> tuple[torch.Tensor, ...]:
        slots = _slots(T, E, K)
        y, upstream = (torch.randn(n, D, device="cuda", dtype=torch.bfloat16) for n in (T * K, T))
        weights = torch.rand(T * K, device="cuda").requires_grad_()
        return y.requires_grad_(), weights, slots.slot_A, slots.ends_E, upstream

    def ours(y: torch.Tensor, weights: torch.Tensor, slot_A: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        return combine(y, weights, Slots(slot_A, ends_E, None, K))

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        with chosen("reference"):
            return ours(*arguments)

    # Forward y and out; backward the gradient, y again and its gradient.
    floor = Floor(bytes=2 * (3 * T * K * D + 2 * T * D))
    shape = {"direction": "combine", "T": T, "D": D, "E": E, "K": K}
    return Case("moe_dispatch", shape, floor, inputs, {"triton": ours, "reference": reference}, target=1.2)
