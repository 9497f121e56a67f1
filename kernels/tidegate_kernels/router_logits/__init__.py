"""Router logits in fp32 from bf16 rows and weights, without fp32 copies of them.

Letters: N rows, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.router_logits import reference

__all__ = ["router_logits"]


def router_logits(x_ND: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    """(N, E) `x w^T` in fp32; see the reference for arguments.

    bf16 inputs are multiplied on tensor cores, which is exact, and summed in fp32. So is their gradient, with the
    gradient of the logits cut to 16 significant bits.
    """
    if not (x_ND.dtype == w_ED.dtype == torch.bfloat16 and takes_triton(x_ND)):
        return reference.router_logits(x_ND, w_ED)
    return _router_logits(x_ND, w_ED)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 product of two bf16 matrices."""
    if a.is_cpu:  # no such product there, but one of the same numbers
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@torch.library.custom_op("tidegate::router_logits", mutates_args=())
def _router_logits(x_ND: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    return _product(x_ND, w_ED.t())


@_router_logits.register_fake
def _(x_ND: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    return x_ND.new_empty(x_ND.shape[0], w_ED.shape[0], dtype=torch.float32)


@torch.library.custom_op("tidegate::router_logits_backward", mutates_args=())
def _router_logits_backward(
    g_NE: torch.Tensor, x_ND: torch.Tensor, w_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.router_logits import triton

    g_N2E = triton.split(g_NE)
    dx_ND = g_N2E @ torch.cat([w_ED, w_ED])
    high_ED, low_ED = _product(g_N2E.t(), x_ND).chunk(2)
    return dx_ND, (high_ED + low_ED).to(w_ED.dtype)


@_router_logits_backward.register_fake
def _(g_NE: torch.Tensor, x_ND: torch.Tensor, w_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x_ND.new_empty(x_ND.shape), w_ED.new_empty(w_ED.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _router_logits_backward(g_NE, *ctx.saved_tensors)


_router_logits.register_autograd(_differentiate, setup_context=_save)
