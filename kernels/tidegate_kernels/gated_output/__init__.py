"""Gate a tensor of attention by activated scores: `y * act(z)` or `y + act(z)`.

Letters: B batch, T tokens, H heads, d head width, s score width (d or 1).
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.gated_output import reference
from tidegate_kernels.gated_output.reference import ACTIVATIONS
from tidegate_kernels.tiles import MOST_PROGRAMS, WIDEST, unit_stride

__all__ = ["ACTIVATIONS", "gated_output"]


def gated_output(
    y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, *, activation: str, form: str, shared: bool
) -> torch.Tensor:
    """Modulate `y` by activated scores; see `reference.gated_output` for arguments, result and source.

    Shared scores are activated and averaged by the reference, then applied by the kernel.
    """
    fits = y_BTHd.shape[-1] <= WIDEST and y_BTHd.shape[:-3].numel() <= MOST_PROGRAMS
    if not takes_triton(y_BTHd, fits=fits):
        return reference.gated_output(y_BTHd, scores_BTHs, activation=activation, form=form, shared=shared)
    if shared:
        mean = ACTIVATIONS[activation](scores_BTHs.float()).mean(dim=-2, keepdim=True)
        scores_BTHs, activation = mean.expand_as(scores_BTHs), "identity"
    out: torch.Tensor = _gated_output(_four_axes(y_BTHd), _four_axes(scores_BTHs), activation, form == "additive")
    return out.view(y_BTHd.shape)


def _four_axes(x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, d) with a unit last stride."""
    x = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x.flatten(0, x.ndim - 4)
    return unit_stride(x)


@torch.library.custom_op("tidegate::gated_output", mutates_args=())
def _gated_output(y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, activation: str, additive: bool) -> torch.Tensor:
    from tidegate_kernels.gated_output import triton

    return triton.forward(y_BTHd, scores_BTHs, activation, additive)


@_gated_output.register_fake
def _(y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, activation: str, additive: bool) -> torch.Tensor:
    return torch.empty_like(y_BTHd)


@torch.library.custom_op("tidegate::gated_output_backward", mutates_args=())
def _gated_output_backward(
    g_BTHd: torch.Tensor, y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, activation: str, additive: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.gated_output import triton

    return triton.backward(unit_stride(g_BTHd), y_BTHd, scores_BTHs, activation, additive)


@_gated_output_backward.register_fake
def _(
    g_BTHd: torch.Tensor, y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, activation: str, additive: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(y_BTHd), torch.empty_like(scores_BTHs, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, scores, ctx.activation, ctx.additive = inputs
    ctx.save_for_backward(y, scores)


def _differentiate(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    dy, dz = _gated_output_backward(g, *ctx.saved_tensors, ctx.activation, ctx.additive)
    return dy, dz, None, None


_gated_output.register_autograd(_differentiate, setup_context=_save)
