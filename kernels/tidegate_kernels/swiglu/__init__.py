"""SwiGLU's elementwise part, `silu(gate) * up`, with a routing weight of each row.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.swiglu import reference
from tidegate_kernels.tiles import rows, unit_stride

__all__ = ["swiglu"]


def swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Activate; see `reference.swiglu` for arguments, result and source."""
    alike = gate_NF.shape == up_NF.shape and gate_NF.dtype == up_NF.dtype
    if not takes_triton(gate_NF, fits=alike and _fits(weights_N)):
        return reference.swiglu(gate_NF, up_NF, weights_N)
    out: torch.Tensor = _swiglu(rows(gate_NF), rows(up_NF), _flat(weights_N))
    return out.view(gate_NF.shape)


def _fits(weights_N: torch.Tensor | None) -> bool:
    return weights_N is None or weights_N.dtype == torch.float32


def _flat(weights_N: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights_N is None else weights_N.flatten().contiguous()


@torch.library.custom_op("tidegate::swiglu", mutates_args=())
def _swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    from tidegate_kernels.swiglu import triton

    return triton.forward(gate_NF, up_NF, weights_N)


@_swiglu.register_fake
def _(gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    return gate_NF.new_empty(gate_NF.shape)


@torch.library.custom_op("tidegate::swiglu_backward", mutates_args=())
def _swiglu_backward(
    g_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three; that of the weights is (0,) without them."""
    from tidegate_kernels.swiglu import triton

    dgate, dup, _, dweights = triton.backward(unit_stride(g_NF), gate_NF, up_NF, weights_N, activated=False)
    return dgate, dup, g_NF.new_empty(0) if dweights is None else dweights


@_swiglu_backward.register_fake
def _(
    g_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dgate, dup = (g_NF.new_empty(x.shape) for x in (gate_NF, up_NF))
    return dgate, dup, g_NF.new_empty(0) if weights_N is None else torch.empty_like(weights_N)


def _save(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing lets go of what it gave
    gradients = _swiglu_backward(g, *saved)
    return tuple(None if x is None else gradient for x, gradient in zip(saved, gradients, strict=True))


_swiglu.register_autograd(_differentiate, setup_context=_save)
