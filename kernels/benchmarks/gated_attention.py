"""`gated_attention`: without documents beside ungated cuDNN attention, with them beside a mask.

The floor is that of cuDNN's measured rate for ungated causal attention, 450 TFLOP/s forward and backward, over the
pairs that the queries see; bytes are far below.
Letters: B batch, T tokens, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.choice import chosen
from tidegate_kernels.gated_attention import Documents, gated_attention, reference, sdpa
from tidegate_kernels.gated_attention import _gated_attention as ours_alone

_CUDNN = 450e12


def cases() -> Iterator[Case]:
    for shape in ((4, 4096, 16, 16, 128), (4, 4096, 16, 4, 128), (16, 2048, 16, 4, 64)):
        yield _case(*shape, mean_length=None)
    for shape in ((16, 2048, 16, 4, 64), (4, 4096, 16, 4, 128), (2, 3000, 12, 4, 96)):
        for mean_length in (300, 1500):
            yield _case(*shape, mean_length=mean_length)


def _case(B: int, T: int, H: int, G: int, d: int, mean_length: int | None) -> Case:
    if mean_length is None:
        ids = torch.zeros(B, T, dtype=torch.int64, device="cuda")
    else:
        ids = (torch.rand(B, T, device="cuda") < 1 / mean_length).long().cumsum(dim=1)
    documents = {sequences: Documents(ids[:sequences]) for sequences in (1, B)}

    def inputs(sequences: int = B) -> tuple[torch.Tensor, ...]:
        q, k, v, z, g = (
            torch.randn(sequences, T, heads, d, device="cuda", dtype=torch.bfloat16) for heads in (H, G, G, H, H)
        )
        return *(x.requires_grad_() for x in (q, k, v, z)), g

    def given(q: torch.Tensor) -> Documents | None:
        return None if mean_length is None else documents[len(q)]

    def triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        packed = given(q)
        spans = (None, None) if packed is None else (packed.first_BT, packed.end_BT)
        return ours_alone(q, k, v, z, "sigmoid", *spans, None)[0]

    def chosen_path(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return gated_attention(q, k, v, z, documents=given(q))

    def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return reference.gated_attention(q, k, v, z, documents=given(q))

    def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        with chosen("reference"):
            return gated_attention(q, k, v, z, documents=given(q))

    def ungated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        # Without its mask with documents: what attention over all earlier tokens would cost.
        return sdpa.attend(q, k, v, None)

    pairs = float((torch.arange(T, device="cuda") - documents[B].first_BT + 1).sum())
    flops = 3.5 * 4 * H * d * pairs
    floor = Floor(bytes=2 * B * T * d * (8 * H + 4 * G), flops=flops, rate=_CUDNN)
    shape: dict[str, Any] = {"B": B, "T": T, "H": H, "G": G, "d": d}
    if mean_length is not None:
        shape["document"] = mean_length
    implementations: dict[str, Callable[..., Any]] = {
        "triton": triton,
        "chosen": chosen_path,
        "reference": explicit,
        "sdpa, PyTorch gate": apart,
        "sdpa, no gate": ungated,
    }
    return Case(
        "gated_attention", shape, floor, inputs, implementations, target=1.03, check_inputs=lambda: inputs(sequences=1)
    )
