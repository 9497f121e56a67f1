"""The truth of linear attention: its recurrence, a token at a time, in plain PyTorch, fp32 inside (fp64 of fp64).

Letters: B batch, T tokens, H heads, K key width, V value width, k decays a head (K or 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate_kernels.gated_attention.documents import Documents

__all__ = ["LinearOutput", "linear_attention"]


class LinearOutput(NamedTuple):
    y_BTHV: torch.Tensor
    """In the dtype of the values."""
    state_BHKV: torch.Tensor
    """fp32 (fp64 of fp64): what the last document of each sequence goes on from."""


def linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTHk: torch.Tensor,
    beta_BTH: torch.Tensor | None = None,
    documents: Documents | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> LinearOutput:
    """`y_t = S_t^T q_t / sqrt(K)`, where `S_t = diag(a_t) S_{t-1}` plus what token t writes, `a_t = exp(log_decay_t)`.

    Without beta a token adds `k_t v_t^T`: gated linear attention (arXiv 2312.06635, Eq. 3). With it, by the delta rule,
    `beta_t k_t (v_t - k_t^T diag(a_t) S_{t-1})^T`, which replaces what its key held: Kimi Delta Attention (arXiv
    2510.26692, Eq. 1), and with one decay a head Gated DeltaNet (arXiv 2412.06464, Eq. 10).

    Args:
        q_BTHK, k_BTHK: of one shape; the delta rule wants keys of length 1.
        v_BTHV: of the same dtype.
        log_decay_BTHk: not above 0; of every key channel, or one a head.
        beta_BTH: 0 keeps what is there, 1 replaces it; up to 2 reflects it.
        documents: each begins with an empty state; None for one document a sequence.
        state_BHKV: what the first document of each sequence goes on from; None for nothing.
    """
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    q, k, v, decay = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHk))
    B, T, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if state_BHKV is None else state_BHKV.to(dtype)
    seen = []
    for t in range(T):
        state = state * decay[:, t].exp().unsqueeze(-1)
        if documents is not None and t > 0:
            begins_B = documents.first_BT[:, t] == t
            state = torch.where(begins_B[:, None, None, None], torch.zeros_like(state), state)
        write = v[:, t]
        if beta_BTH is not None:
            held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            write = beta_BTH[:, t].to(dtype).unsqueeze(-1) * (write - held)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        seen.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * K**-0.5)
    return LinearOutput(torch.stack(seen, dim=1).to(v_BTHV.dtype), state)
