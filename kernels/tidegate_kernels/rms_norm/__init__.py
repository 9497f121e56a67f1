"""Root mean square normalisation of rows, alone or of a sum with the residual stream.

Letters: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.rms_norm import reference
from tidegate_kernels.rms_norm.reference import AddedNorm
from tidegate_kernels.tiles import WIDEST, rows, unit_stride

__all__ = ["AddedNorm", "add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise over the last axis; see `reference.rms_norm` for arguments, result and source."""
    if not takes_triton(x, fits=_fits(x, weight_D)):
        return reference.rms_norm(x, weight_D, eps)
    out, _ = _rms_norm(rows(x), None, weight_D.contiguous(), eps)
    return out.view(x.shape)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float) -> AddedNorm:
    """Add to the residual stream and normalise the sum; see `reference.add_rms_norm`."""
    alike = x.shape == residual.shape and x.dtype == residual.dtype
    if not takes_triton(x, fits=alike and _fits(x, weight_D)):
        return reference.add_rms_norm(x, residual, weight_D, eps)
    normalised, total = _rms_norm(rows(x), rows(residual), weight_D.contiguous(), eps)
    return AddedNorm(normalised.view(x.shape), total.view(x.shape))


def _fits(x: torch.Tensor, weight_D: torch.Tensor) -> bool:
    return x.shape[-1] <= WIDEST and weight_D.dtype == x.dtype


@torch.library.custom_op("tidegate::rms_norm", mutates_args=())
def _rms_norm(
    x_ND: torch.Tensor, residual_ND: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.rms_norm import triton

    return triton.forward(x_ND, residual_ND, weight_D, eps)


@_rms_norm.register_fake
def _(
    x_ND: torch.Tensor, residual_ND: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    return out, x_ND.new_empty(0) if residual_ND is None else torch.empty_like(out)


@torch.library.custom_op("tidegate::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    g_ND: torch.Tensor, g_total_ND: torch.Tensor | None, x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.rms_norm import triton

    g_total = None if g_total_ND is None else unit_stride(g_total_ND)
    return triton.backward(unit_stride(g_ND), g_total, x_ND, weight_D, eps)


@_rms_norm_backward.register_fake
def _(
    g_ND: torch.Tensor, g_total_ND: torch.Tensor | None, x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.empty_like(weight_D)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.adds = residual is not None
    ctx.save_for_backward(output[1] if ctx.adds else x, weight)


def _differentiate(
    ctx: Any, g: torch.Tensor, g_total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, None]:
    dx, dweight = _rms_norm_backward(g, g_total if ctx.adds else None, *ctx.saved_tensors, ctx.eps)
    return dx, dx if ctx.adds else None, dweight, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
