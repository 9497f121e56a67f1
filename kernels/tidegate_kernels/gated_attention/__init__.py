"""Causal attention with its output gate, inside documents or a window of them, with an optional sink.

Two paths: cuDNN's (or torch's fastest) attention with `gated_output` behind it, and our flash attention with the gate
in its epilogue, which skips the blocks of other documents and those before a window. The first is taken where a token
sees all earlier ones, where it was measured faster on an H100 (kernels/README.md); the second otherwise, for the blocks
it skips, which is not measured yet.

Letters: B batch, T tokens, H query heads, G key/value heads, d head width, s score width (d or 1).
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.gated_attention import sdpa
from tidegate_kernels.gated_attention.documents import Documents, Visible, nearest
from tidegate_kernels.gated_output import gated_output
from tidegate_kernels.tiles import MOST_PROGRAMS, unit_stride

__all__ = ["Documents", "Visible", "gated_attention", "nearest", "sdpa"]

_WIDEST = 256
"""Largest head width of our kernels."""


def gated_attention(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    scores_BTHs: torch.Tensor | None,
    *,
    activation: str = "sigmoid",
    documents: Visible | None = None,
    sink_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """`softmax(q k^T / sqrt(d)) v * act(scores)`, causal.

    Args:
        q_BTHd, k_BTGd, v_BTGd: G divides H.
        scores_BTHs: of a multiplicative gate, before its activation; None for no gate.
        activation: a key of `gated_output.ACTIVATIONS`.
        documents: attention stays inside them, or in a window of them; None attends to all earlier tokens.
        sink_H: logit of a sink of each head, see `sdpa`.

    Returns:
        (B, T, H, d) in the dtype of `q_BTHd`.

    Source: gated attention (arXiv 2505.06708), Eq. 5; FlashAttention-2 (arXiv 2307.08691).
    """
    B, _, H, d = q_BTHd.shape
    if documents is not None and takes_triton(q_BTHd, fits=d <= _WIDEST and B * H <= MOST_PROGRAMS):
        q, k, v = (unit_stride(x) for x in (q_BTHd, k_BTGd, v_BTGd))
        scores = None if scores_BTHs is None else unit_stride(scores_BTHs)
        sink = None if sink_H is None else sink_H.contiguous()
        return _gated_attention(q, k, v, scores, activation, documents.first_BT, documents.end_BT, sink)[0]
    mask = None if documents is None else documents.mask
    if sink_H is None:
        y_BTHd = sdpa.attend(q_BTHd, k_BTGd, v_BTGd, mask)
    else:
        y_BTHd = sdpa.attend_with_sink(q_BTHd, k_BTGd, v_BTGd, mask, sink_H)
    if scores_BTHs is None:
        return y_BTHd
    return gated_output(y_BTHd, scores_BTHs, activation=activation, form="multiplicative", shared=False)


@torch.library.custom_op("tidegate::gated_attention", mutates_args=())
def _gated_attention(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    scores_BTHs: torch.Tensor | None,
    activation: str,
    first_BT: torch.Tensor | None,
    end_BT: torch.Tensor | None,
    sink_H: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, the output before the gate (empty without one), log-sum-exp (B, H, T)."""
    from tidegate_kernels.gated_attention import triton

    spans = None if first_BT is None or end_BT is None else triton.Spans(first_BT, end_BT)
    gate = None if scores_BTHs is None else triton.Gate(scores_BTHs, activation)
    y, out, lse = triton.forward(q_BTHd, k_BTGd, v_BTGd, spans, sink_H, gate)
    return out, y if gate is not None else y.new_empty(0), lse


@_gated_attention.register_fake
def _(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    scores_BTHs: torch.Tensor | None,
    activation: str,
    first_BT: torch.Tensor | None,
    end_BT: torch.Tensor | None,
    sink_H: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, _ = q_BTHd.shape
    y = q_BTHd.new_empty(q_BTHd.shape if scores_BTHs is not None else (0,))
    return q_BTHd.new_empty(q_BTHd.shape), y, q_BTHd.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("tidegate::gated_attention_backward", mutates_args=())
def _gated_attention_backward(
    g_BTHd: torch.Tensor,
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    y_BTHd: torch.Tensor,
    lse_BHT: torch.Tensor,
    scores_BTHs: torch.Tensor | None,
    activation: str,
    first_BT: torch.Tensor | None,
    end_BT: torch.Tensor | None,
    sink_H: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, scores and sink, the last two empty where they are not there."""
    from tidegate_kernels.gated_attention import triton

    spans = None if first_BT is None or end_BT is None else triton.Spans(first_BT, end_BT)
    gate = None if scores_BTHs is None else triton.Gate(scores_BTHs, activation)
    gradients = triton.backward(unit_stride(g_BTHd), q_BTHd, k_BTGd, v_BTGd, y_BTHd, lse_BHT, spans, gate)
    dscores = q_BTHd.new_empty(0) if gradients.dscores is None else gradients.dscores
    dsink = q_BTHd.new_empty(0)
    if sink_H is not None:
        weight_BHT = torch.exp(sink_H.float()[:, None] - lse_BHT)
        dsink = -(weight_BHT * gradients.sums_BHT).sum(dim=(0, 2)).to(sink_H.dtype)
    return gradients.dq, gradients.dk, gradients.dv, dscores, dsink


@_gated_attention_backward.register_fake
def _(
    g_BTHd: torch.Tensor,
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    y_BTHd: torch.Tensor,
    lse_BHT: torch.Tensor,
    scores_BTHs: torch.Tensor | None,
    activation: str,
    first_BT: torch.Tensor | None,
    end_BT: torch.Tensor | None,
    sink_H: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_BTHd, k_BTGd, v_BTGd))
    dscores = q_BTHd.new_empty(0) if scores_BTHs is None else scores_BTHs.new_empty(scores_BTHs.shape)
    return dq, dk, dv, dscores, q_BTHd.new_empty(0) if sink_H is None else torch.empty_like(sink_H)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, scores, ctx.activation, first, end, sink = inputs
    out, y, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out if scores is None else y, lse, scores, first, end, sink)


def _differentiate(ctx: Any, g_BTHd: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, scores, first, end, sink = ctx.saved_tensors
    dq, dk, dv, dscores, dsink = _gated_attention_backward(g_BTHd, *tensors, scores, ctx.activation, first, end, sink)
    given = (None if scores is None else dscores), None, None, None, (None if sink is None else dsink)
    return dq, dk, dv, *given


_gated_attention.register_autograd(_differentiate, setup_context=_save)
