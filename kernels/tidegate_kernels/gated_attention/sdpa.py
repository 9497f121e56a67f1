"""Scaled dot-product attention on fused kernels: the plain softmax, or one with an extra logit, a sink.

With a sink of logit s the weights are `p_j = exp(z_j) / (exp(s) + sum_k exp(z_k))`: a head can attend to nothing. It is
the plain output times `sigmoid(lse - s)`, a gate that follows from the scores alone.
Source: off-by-one softmax is s = 0 (Miller 2023); learnable s is gpt-oss (2025).

Letters: B batch, T tokens, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["BACKENDS", "attend", "attend_with_sink"]

BACKENDS = [  # fastest first on Hopper (docs/measurements.md)
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(q_BTHd: torch.Tensor, k_BTGd: torch.Tensor, v_BTGd: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Plain attention on the fastest backend that takes these inputs; (B, T, H, d) out.

    Args:
        q_BTHd, k_BTGd, v_BTGd: G divides H.
        mask: (B, 1, T, T) bool, True where query t may see key s; None for causal attention.
    """
    q, k, v = q_BTHd.transpose(1, 2), k_BTGd.transpose(1, 2), v_BTGd.transpose(1, 2)
    if q.is_meta:  # where torch would take attention apart: shapes, and what is kept, are those of a fused kernel
        y = _forward(SDPBackend.FLASH_ATTENTION, q, k, v, None if mask is None else _bias(mask, q))[0]
        return y.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(BACKENDS, set_priority=True):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def attend_with_sink(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    v_BTGd: torch.Tensor,
    mask: torch.Tensor | None,
    sink_H: torch.Tensor,
) -> torch.Tensor:
    """Attention with a sink of logit `sink_H` on each head, exact, with the gradient of the sink.

    The kernels are those of plain attention, with the log-sum-exp that they keep for their backward pass: on CUDA
    cuDNN or flash attention where plain attention would take them, else the memory-efficient kernel (fp32; a mask
    without cuDNN), slower, with keys and values repeated over the heads of a group. A CUDA head width must be a
    multiple of 8.

    Args:
        q_BTHd, k_BTGd, v_BTGd, mask: as for `attend`.
        sink_H: (H,), any float dtype.

    Returns:
        (B, T, H, d) in the dtype of `q_BTHd`.
    """
    if q_BTHd.is_cuda and q_BTHd.shape[-1] % 8:
        raise ValueError(f"head_dim={q_BTHd.shape[-1]} is no multiple of 8, which attention with a sink wants on CUDA")
    q, k, v = q_BTHd.transpose(1, 2), k_BTGd.transpose(1, 2), v_BTGd.transpose(1, 2)
    kernel = _kernel(q, k, v, mask)
    if kernel == SDPBackend.EFFICIENT_ATTENTION:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    y: torch.Tensor = _SinkAttention.apply(q, k, v, mask, sink_H, kernel)
    return y.transpose(1, 2)


def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> SDPBackend:
    if not q.is_cuda:
        return SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(BACKENDS, set_priority=True):
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None, enable_gqa=q.shape[1] != k.shape[1])
    kernel = SDPBackend(choice)
    fused = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    return kernel if kernel in fused else SDPBackend.EFFICIENT_ATTENTION


class _SinkAttention(torch.autograd.Function):
    """Kernels of plain attention around an elementwise step.

    Their backward pass recomputes `p = exp(z - lse)` and takes `sum(dy * y)` of each row. Given the log-sum-exp and the
    output of the softmax *with* the sink, both are those of that softmax: the sink's value is zero, so it adds nothing
    to a row's sum. What is left is ds = -sum over rows of (weight of the sink) * sum(dy * y).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        sink_H: torch.Tensor,
        kernel: SDPBackend,
    ) -> torch.Tensor:
        ctx.kernel = kernel
        y, lse_BHT, *rest = _forward(kernel, q, k, v, None if mask is None else _bias(mask, q))
        # In what the kernel keeps of it: fp32, or fp64 on the CPU. Efficient attention pads T to a multiple of 32.
        sink = sink_H.to(lse_BHT.dtype)[:, None]
        opening = torch.sigmoid(lse_BHT[..., : q.shape[2]] - sink)
        y = (y * opening.unsqueeze(-1)).to(q.dtype)
        ctx.save_for_backward(q, k, v, y, torch.logaddexp(lse_BHT, sink), mask, sink_H, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, y, lse_BHT, mask, sink_H, *rest = ctx.saved_tensors
        bias = None if mask is None else _bias(mask, q)
        dq, dk, dv = _backward(ctx.kernel, dy, q, k, v, bias, y, lse_BHT, rest)
        rows_BHT = (dy.to(lse_BHT.dtype) * y).sum(dim=-1)
        weight_BHT = torch.exp(sink_H.to(lse_BHT.dtype)[:, None] - lse_BHT[..., : q.shape[2]])
        return dq, dk, dv, None, -(weight_BHT * rows_BHT).sum(dim=(0, 2)).to(sink_H.dtype), None


def _bias(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The mask as numbers to add, (B, H, T, T), in rows of whole 16 bytes as the CUDA kernel wants."""
    T = mask.shape[-1]
    rows = mask.new_zeros(*mask.shape[:-1], -(-T // 8) * 8, dtype=q.dtype)[..., :T]
    return rows.masked_fill_(~mask, -torch.inf).expand(-1, q.shape[1], -1, -1)


def _forward(
    kernel: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Output, log-sum-exp (B, H, T), and what else the backward pass of the same kernel wants."""
    aten, causal = torch.ops.aten, bias is None
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    if kernel == SDPBackend.CUDNN_ATTENTION:
        y, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal)
        return y, lse.squeeze(-1), seed, offset
    if kernel == SDPBackend.FLASH_ATTENTION:
        y, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        y, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
    return y, lse, seed, offset


def _backward(
    kernel: SDPBackend,
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    rest: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    aten, causal, T = torch.ops.aten, bias is None, q.shape[2]
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, causal, attn_mask=bias
        )
    seed, offset = rest
    if kernel == SDPBackend.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention_backward(
            dy, q, k, v, y, lse.unsqueeze(-1), seed, offset, bias, None, None, T, T, 0.0, causal
        )
    if kernel == SDPBackend.FLASH_ATTENTION:
        return aten._scaled_dot_product_flash_attention_backward(
            dy, q, k, v, y, lse, None, None, T, T, 0.0, causal, seed, offset
        )
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dy, q, k, v, bias, y, lse, seed, offset, 0.0, [True, True, True, False], causal
    )
    return dq, dk, dv
