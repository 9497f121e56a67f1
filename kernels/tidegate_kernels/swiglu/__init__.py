"""SwiGLU's elementwise part, `silu(gate) * up`, with a routing weight of each row.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.swiglu import reference
from tidegate_kernels.tiles import rows, unit_stride

__all__ = ["swiglu", "swiglu_packed"]


def swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Activate; see `reference.swiglu` for arguments, result and source."""
    alike = gate_NF.shape == up_NF.shape and gate_NF.dtype == up_NF.dtype
    if not takes_triton(gate_NF, fits=alike and _fits(weights_N)):
        return reference.swiglu(gate_NF, up_NF, weights_N)
    out: torch.Tensor = _swiglu(rows(gate_NF), rows(up_NF), _flat(weights_N))
    return out.view(gate_NF.shape)


def swiglu_packed(gate_up_N2F: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Activate the halves of one product; the gradients of both are written as the halves of one tensor."""
    if not takes_triton(gate_up_N2F, fits=_fits(weights_N)):
        return reference.swiglu_packed(gate_up_N2F, weights_N)
    out: torch.Tensor = _swiglu(rows(gate_up_N2F), None, _flat(weights_N))
    return out.view(*gate_up_N2F.shape[:-1], out.shape[1])


def _fits(weights_N: torch.Tensor | None) -> bool:
    return weights_N is None or weights_N.dtype == torch.float32


def _flat(weights_N: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights_N is None else weights_N.flatten().contiguous()


@torch.library.custom_op("tidegate::swiglu", mutates_args=())
def _swiglu(gate: torch.Tensor, up: torch.Tensor | None, weights_N: torch.Tensor | None) -> torch.Tensor:
    """Without `up`, `gate` is (N, 2 F) with both."""
    from tidegate_kernels.swiglu import triton

    return triton.forward(gate, weights_N) if up is None else triton.forward_apart(gate, up, weights_N)


@_swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor | None, weights_N: torch.Tensor | None) -> torch.Tensor:
    return gate.new_empty(gate.shape[0], gate.shape[1] // (2 if up is None else 1))


@torch.library.custom_op("tidegate::swiglu_backward", mutates_args=())
def _swiglu_backward(
    g_NF: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three; (0,) of what is None."""
    from tidegate_kernels.swiglu import triton

    g = unit_stride(g_NF)
    if up is None:
        dgate, _, dweights = triton.backward(g, gate, weights_N, activated=False)
        dup = g.new_empty(0)
    else:
        dgate, dup, dweights = triton.backward_apart(g, gate, up, weights_N)
    return dgate, dup, g.new_empty(0) if dweights is None else dweights


@_swiglu_backward.register_fake
def _(
    g_NF: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, weights_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dgate, dup = (g_NF.new_empty(0 if x is None else x.shape) for x in (gate, up))
    return dgate, dup, g_NF.new_empty(0) if weights_N is None else torch.empty_like(weights_N)


def _save(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _swiglu_backward(g, *ctx.saved_tensors)
    return tuple(None if x is None else gradient for x, gradient in zip(ctx.saved_tensors, gradients, strict=True))


_swiglu.register_autograd(_differentiate, setup_context=_save)
