"""PolyCom's polynomial of normalised powers, with a routing weight of each row.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.poly_norm import reference
from tidegate_kernels.tiles import WIDEST, rows, unit_stride

__all__ = ["poly_norm"]


def poly_norm(x_NF: torch.Tensor, coefficients: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Apply the polynomial; see `reference.poly_norm` for arguments, result and source."""
    fits = x_NF.shape[-1] <= WIDEST and (weights_N is None or weights_N.dtype == torch.float32)
    if not takes_triton(x_NF, fits=fits):
        return reference.poly_norm(x_NF, coefficients, weights_N)
    x = rows(x_NF)
    coefficients_N4 = rows(coefficients.float()).expand(x.shape[0], 4)
    weights = None if weights_N is None else weights_N.flatten().contiguous()
    out: torch.Tensor = _poly_norm(x, coefficients_N4, weights)
    return out.view(x_NF.shape)


@torch.library.custom_op("tidegate::poly_norm", mutates_args=())
def _poly_norm(x_NF: torch.Tensor, coefficients_N4: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    from tidegate_kernels.poly_norm import triton

    return triton.forward(x_NF, coefficients_N4, weights_N)


@_poly_norm.register_fake
def _(x_NF: torch.Tensor, coefficients_N4: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(x_NF, memory_format=torch.contiguous_format)


@torch.library.custom_op("tidegate::poly_norm_backward", mutates_args=())
def _poly_norm_backward(
    g_NF: torch.Tensor, x_NF: torch.Tensor, coefficients_N4: torch.Tensor, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the other three; (0,) of no weights."""
    from tidegate_kernels.poly_norm import triton

    dx, dcoefficients, dweights = triton.backward(unit_stride(g_NF), x_NF, coefficients_N4, weights_N)
    return dx, dcoefficients, coefficients_N4.new_empty(0) if dweights is None else dweights


@_poly_norm_backward.register_fake
def _(
    g_NF: torch.Tensor, x_NF: torch.Tensor, coefficients_N4: torch.Tensor, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dcoefficients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x_NF, coefficients_N4))
    return dx, dcoefficients, coefficients_N4.new_empty(0 if weights_N is None else weights_N.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing lets go of what it gave
    dx, dcoefficients, dweights = _poly_norm_backward(g, *saved)
    return dx, dcoefficients, None if saved[2] is None else dweights


_poly_norm.register_autograd(_differentiate, setup_context=_save)
