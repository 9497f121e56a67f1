"""Linear attention with decays, by addition or by the delta rule: the two recurrences of gated linear token mixers.

By addition with one decay a head it has Triton kernels of its own. The others run on those of flash-linear-attention
where it is installed, else in chunks on plain PyTorch.

Letters: B batch, T tokens, H heads, K key width, V value width, k decays a head (K or 1).
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.gated_attention.documents import Documents
from tidegate_kernels.linear_attention import chunked, fla
from tidegate_kernels.linear_attention.reference import LinearOutput
from tidegate_kernels.tiles import unit_stride

__all__ = ["LinearOutput", "linear_attention"]

_WIDEST = 256
"""Largest key and value width of the kernels."""


def linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTHk: torch.Tensor,
    beta_BTH: torch.Tensor | None = None,
    documents: Documents | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> LinearOutput:
    """See `reference.linear_attention` for arguments, result and sources."""
    given = q_BTHK, k_BTHK, v_BTHV, log_decay_BTHk, beta_BTH, documents, state_BHKV
    delta, by_head = beta_BTH is not None, log_decay_BTHk.shape[-1] == 1
    if by_head and not delta:
        alike = q_BTHK.dtype == k_BTHK.dtype == v_BTHV.dtype
        fits = alike and max(q_BTHK.shape[-1], v_BTHV.shape[-1]) <= _WIDEST
        if takes_triton(v_BTHV, fits=fits):
            q, k, v = (unit_stride(x) for x in (q_BTHK, k_BTHK, v_BTHV))
            first_BT = None if documents is None else documents.first_BT
            state = None if state_BHKV is None else state_BHKV.float().contiguous()
            return LinearOutput(*_linear_attention(q, k, v, log_decay_BTHk, first_BT, state)[:2])
    elif (kernel := fla.kernel_for(v_BTHV, q_BTHK.shape[-1], delta=delta, by_head=by_head)) is not None:
        return fla.linear_attention(kernel, *given)
    return chunked.linear_attention(*given)


@torch.library.custom_op("tidegate::linear_attention", mutates_args=())
def _linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTH1: torch.Tensor,
    first_BT: torch.Tensor | None,
    state_BHKV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, the state behind them, and for the backward pass the states before chunks and sums of decays in them."""
    from tidegate_kernels.linear_attention import triton

    return triton.forward(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH1, first_BT, state_BHKV)


@_linear_attention.register_fake
def _(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTH1: torch.Tensor,
    first_BT: torch.Tensor | None,
    state_BHKV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from tidegate_kernels.linear_attention import triton

    B, T, H, K = q_BTHK.shape
    V, C = v_BTHV.shape[-1], triton.tiles_of(q_BTHK.dtype).chunk
    N = -(-T // C)
    state, sums = (q_BTHK.new_empty(B, H, *shape, dtype=torch.float32) for shape in ((K, V), (N * C,)))
    return v_BTHV.new_empty(v_BTHV.shape), state, v_BTHV.new_empty(B, H, N, K, V), sums


@torch.library.custom_op("tidegate::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    g_BTHV: torch.Tensor,
    g_state_BHKV: torch.Tensor | None,
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    states_BHNKV: torch.Tensor,
    sums_BHt: torch.Tensor,
    first_BT: torch.Tensor | None,
    begins: bool,
    decay_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, decays and the state that was given, which is of no use if none was (`begins`)."""
    from tidegate_kernels.linear_attention import triton

    g_state = None if g_state_BHKV is None else g_state_BHKV.float().contiguous()
    return triton.backward(
        unit_stride(g_BTHV), g_state, q_BTHK, k_BTHK, v_BTHV, states_BHNKV, sums_BHt, first_BT, begins, decay_dtype
    )  # fmt: skip


@_linear_attention_backward.register_fake
def _(
    g_BTHV: torch.Tensor,
    g_state_BHKV: torch.Tensor | None,
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    states_BHNKV: torch.Tensor,
    sums_BHt: torch.Tensor,
    first_BT: torch.Tensor | None,
    begins: bool,
    decay_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_BTHK, k_BTHK, v_BTHV))
    ddecay = q_BTHK.new_empty(*q_BTHK.shape[:3], 1, dtype=decay_dtype)
    return dq, dk, dv, ddecay, states_BHNKV[:, :, 0].float()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, log_decay, first, state = inputs
    ctx.begins, ctx.decay_dtype = state is not None, log_decay.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output[2:], first)


def _differentiate(
    ctx: Any, g_BTHV: torch.Tensor | None, g_state: torch.Tensor | None, *unused: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    *tensors, first = ctx.saved_tensors
    g_BTHV = torch.zeros_like(tensors[2]) if g_BTHV is None else g_BTHV
    *given, dstate = _linear_attention_backward(g_BTHV, g_state, *tensors, first, ctx.begins, ctx.decay_dtype)
    return *given, None, dstate if ctx.begins else None


_linear_attention.register_autograd(_differentiate, setup_context=_save)
