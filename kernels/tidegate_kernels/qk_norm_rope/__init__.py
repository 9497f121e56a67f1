"""RMSNorm of every query and key head, then rotary positions, in one pass.

Letters: B batch, T tokens, H query heads, G key heads, d head width; tables are (T, d/2).
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.qk_norm_rope import reference
from tidegate_kernels.qk_norm_rope.reference import Rotated
from tidegate_kernels.tiles import MOST_PROGRAMS, unit_stride

__all__ = ["Rotated", "qk_norm_rope"]

_WIDEST = 2048
"""Largest d that the kernel takes: half a head is a tile at most."""


def qk_norm_rope(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> Rotated:
    """Normalise and rotate queries and keys; see `reference.qk_norm_rope` for arguments, result and source.

    The kernel stays in fp32 between norm and rotation, where the reference rounds to the dtype of q and k.

    Raises:
        ValueError: one weight without the other.
    """
    if (q_weight_d is None) != (k_weight_d is None):
        missing = "q_weight_d" if q_weight_d is None else "k_weight_d"
        raise ValueError(f"{missing}=None, but the other is a tensor: give both, or none for rotation only")
    dtypes = {x.dtype for x in (q_BTHd, k_BTGd, q_weight_d, k_weight_d) if x is not None}
    fits = len(dtypes) == 1 and cos_Td.dtype == torch.float32
    fits = fits and q_BTHd.shape[-1] <= _WIDEST and q_BTHd.shape[0] <= MOST_PROGRAMS
    if not takes_triton(q_BTHd, fits=fits):
        return reference.qk_norm_rope(q_BTHd, k_BTGd, q_weight_d, k_weight_d, cos_Td, sin_Td, eps)
    q, k = unit_stride(q_BTHd), unit_stride(k_BTGd)
    weights = (None if x is None else x.contiguous() for x in (q_weight_d, k_weight_d))
    return Rotated(*_qk_norm_rope(q, k, *weights, cos_Td.contiguous(), sin_Td.contiguous(), eps))


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tidegate::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tidegate_kernels.qk_norm_rope import triton

    return triton.forward(q_BTHd, k_BTGd, q_weight_d, k_weight_d, cos_Td, sin_Td, eps)


@_qk_norm_rope.register_fake
def _(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(q_BTHd), _empty(k_BTGd)


@torch.library.custom_op("tidegate::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    gq_BTHd: torch.Tensor,
    gk_BTGd: torch.Tensor,
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tidegate_kernels.qk_norm_rope import triton

    gq, gk = unit_stride(gq_BTHd), unit_stride(gk_BTGd)
    return triton.backward(gq, gk, q_BTHd, k_BTGd, q_weight_d, k_weight_d, cos_Td, sin_Td, eps)


@_qk_norm_rope_backward.register_fake
def _(
    gq_BTHd: torch.Tensor,
    gk_BTGd: torch.Tensor,
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_weights = 0 if q_weight_d is None else 2
    return _empty(q_BTHd), _empty(k_BTGd), q_BTHd.new_empty(num_weights, q_BTHd.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gq: torch.Tensor, gk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing lets go of what it gave
    q_weight = saved[2]
    dq, dk, dweights_2d = _qk_norm_rope_backward(gq, gk, *saved, ctx.eps)
    if q_weight is None:
        return dq, dk, None, None, None, None, None
    dq_weight, dk_weight = dweights_2d.unbind(0)
    return dq, dk, dq_weight, dk_weight, None, None, None


_qk_norm_rope.register_autograd(_differentiate, setup_context=_save)
