"""Score labels by a linear head without keeping the logits: language-model head and loss in one operation.

Letters: N rows, M rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.linear_cross_entropy import reference
from tidegate_kernels.linear_cross_entropy.reference import LinearCrossEntropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]


def linear_cross_entropy(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    z_loss: float,
    soft_cap: float | None,
    ignore_index: int,
    max_bytes: int = 1600 << 20,
) -> LinearCrossEntropy:
    """`sum over n of weights[n] * (nll[n] + z_loss * logsumexp[n]^2)`; see the reference for arguments and source.

    The kernel computes the gradients in the forward pass, where they are wanted, so that the logits of a chunk of rows
    die with the chunk. A label that is neither in [0, V) nor `ignore_index` makes the loss and the gradients NaN.

    Args:
        max_bytes: of the logits that exist at a time. Rows go in as few chunks as fit, one row at least.
    """
    if not takes_triton(x_ND, fits=w_VD.dtype == x_ND.dtype):
        return reference.linear_cross_entropy(
            x_ND, w_VD, labels_N, weights_N, z_loss=z_loss, soft_cap=soft_cap, ignore_index=ignore_index
        )
    rows = max(1, max_bytes // (w_VD.shape[0] * x_ND.element_size()))
    chunks = max(1, -(-x_ND.shape[0] // rows))
    rows = max(1, -(-x_ND.shape[0] // chunks))
    wants_dx, wants_dw = (torch.is_grad_enabled() and t.requires_grad for t in (x_ND, w_VD))
    loss, nll_N, _, _ = _linear_cross_entropy(
        x_ND, w_VD, labels_N, weights_N, z_loss, soft_cap, ignore_index, rows, wants_dx, wants_dw
    )
    return LinearCrossEntropy(loss, nll_N)


@torch.library.custom_op("tidegate::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    z_loss: float,
    soft_cap: float | None,
    ignore_index: int,
    rows: int,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, nll and the gradients of the loss by x and w: empty where not wanted, and dw in fp32 if it is a sum."""
    from tidegate_kernels.linear_cross_entropy import triton

    return triton.forward(
        x_ND, w_VD, labels_N, weights_N, z_loss, soft_cap, ignore_index, rows, wants_dx=wants_dx, wants_dw=wants_dw
    )


@_linear_cross_entropy.register_fake
def _(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    z_loss: float,
    soft_cap: float | None,
    ignore_index: int,
    rows: int,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, nll_N = (x_ND.new_empty(shape, dtype=torch.float32) for shape in ((), x_ND.shape[:1]))
    dx = x_ND.new_empty(x_ND.shape if wants_dx else 0)
    dw_dtype = torch.float32 if wants_dw and rows < x_ND.shape[0] else w_VD.dtype
    return loss, nll_N, dx, w_VD.new_empty(w_VD.shape if wants_dw else 0, dtype=dw_dtype)


@torch.library.custom_op("tidegate::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    g: torch.Tensor, dx: torch.Tensor, dw: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the loss, times the gradient of the loss, in the dtype of x."""
    from tidegate_kernels.linear_cross_entropy import triton

    return triton.scaled(dx, g, dx.dtype), triton.scaled(dw, g, dx.dtype)


@_linear_cross_entropy_backward.register_fake
def _(g: torch.Tensor, dx: torch.Tensor, dw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(dx), torch.empty_like(dw, dtype=dx.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, nll_N, dx, dw = output
    ctx.save_for_backward(dx, dw)
    ctx.wanted = inputs[-2:]
    ctx.mark_non_differentiable(nll_N, dx, dw)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    gradients = [None, None] if g is None else _linear_cross_entropy_backward(g, *ctx.saved_tensors)
    kept = (gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True))
    return *kept, None, None, None, None, None, None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)
