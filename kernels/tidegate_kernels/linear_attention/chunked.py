"""Linear attention in chunks: matrix products inside a chunk, and a state from chunk to chunk, in plain PyTorch.

Decays inside a chunk are taken between two tokens, `exp(sum of log decays from j + 1 to i)`. The usual factors
`exp(L_i)` and `exp(-L_j)` overflow where gates close, and a difference of sums from the chunk's start loses digits
there and hangs on other documents.

Letters: B batch, T tokens, H heads, K key width, V value width, N chunks, C tokens of a chunk (i reads what j wrote).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate_kernels.gated_attention.documents import Documents
from tidegate_kernels.linear_attention.reference import LinearOutput

__all__ = ["linear_attention"]

_TOKENS_BY_CHANNEL, _TOKENS_BY_HEAD = 8, 64
"""Of a chunk: with decays of every channel, i x j x K numbers are in memory; with one a head, i x j."""


class _Sight(NamedTuple):
    """Inside of chunks, who is in whose document; all bool."""

    pairs_BNCC: torch.Tensor
    """Token i may read what j <= i wrote."""
    enters_BNC: torch.Tensor
    """The document of token i began before the chunk, or with the state that was given."""
    leaves_BNC: torch.Tensor
    """Token j is of the document that goes on behind the chunk."""


def linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTHk: torch.Tensor,
    beta_BTH: torch.Tensor | None = None,
    documents: Documents | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> LinearOutput:
    """See `reference.linear_attention`.

    Source: the chunks of gated linear attention (arXiv 2312.06635, section 4), with the UT transform of the delta rule
    (arXiv 2510.26692, Eq. 6 to 9).
    """
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    B, T, H, K = q_BTHK.shape
    V, length = v_BTHV.shape[-1], _TOKENS_BY_HEAD if log_decay_BTHk.shape[-1] == 1 else _TOKENS_BY_CHANNEL
    q, k, v, decay = (_chunks(x.to(dtype), length) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHk))
    sight = _sight(documents, B, T, length, q.device)
    pairs = sight.pairs_BNCC.unsqueeze(1)
    enters, leaves = (seen_BNC[:, None, :, :, None] for seen_BNC in (sight.enters_BNC, sight.leaves_BNC))

    q = q * K**-0.5
    weights = _between(decay, pairs)
    reads = _products(q, k, weights)
    from_start = decay.cumsum(dim=-2).exp() * enters
    behind = torch.nn.functional.pad(decay[..., 1:, :], (0, 0, 0, 1))
    to_end = behind.flip(-2).cumsum(dim=-2).flip(-2).exp() * leaves
    carried = from_start[..., -1, :].unsqueeze(-1)
    q_state, k_out = q * from_start, k * to_end
    if beta_BTH is not None:
        # What each token writes is what is new to it: a triangular system in a chunk, and linear in the state before.
        beta = _chunks(beta_BTH.to(dtype).unsqueeze(-1), length)
        system = beta * _products(k, k, weights).tril(-1) + torch.eye(length, dtype=dtype, device=q.device)
        sides = torch.cat([beta * v, beta * k * from_start], dim=-1)
        new, held = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split([V, K], dim=-1)
    state = q.new_zeros(B, H, K, V) if state_BHKV is None else state_BHKV.to(dtype)
    seen = []
    for n in range(q.shape[2]):
        write = v[:, :, n] if beta_BTH is None else new[:, :, n] - held[:, :, n] @ state
        seen.append(q_state[:, :, n] @ state + reads[:, :, n] @ write)
        state = carried[:, :, n] * state + k_out[:, :, n].mT @ write
    y_BTHV = torch.cat(seen, dim=2)[:, :, :T].transpose(1, 2)
    return LinearOutput(y_BTHV.to(v_BTHV.dtype), state)


def _between(decay: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """(B, H, N, C, C, k) decay from token j to token i, 0 where i may not read j."""
    length = decay.shape[-2]
    after = torch.ones(length, length, dtype=torch.bool, device=decay.device).tril(-1)
    sums = decay.unsqueeze(-2).masked_fill(~after.unsqueeze(-1), 0.0).cumsum(dim=-3)
    return sums.masked_fill(~pairs.unsqueeze(-1), -torch.inf).exp()


def _products(left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B, H, N, C, C) `sum_K left_i right_j weights_ij`."""
    if weights.shape[-1] == 1:
        return (left @ right.mT) * weights.squeeze(-1)
    return torch.einsum("...ik,...jk,...ijk->...ij", left, right, weights)


def _chunks(x_BTHC: torch.Tensor, length: int) -> torch.Tensor:
    """(B, H, N, length, ...) with zeros behind the end: they neither write nor decay."""
    pad = -x_BTHC.shape[1] % length
    x_BTHC = torch.nn.functional.pad(x_BTHC, (0, 0, 0, 0, 0, pad))
    return x_BTHC.transpose(1, 2).unflatten(2, (-1, length))


def _sight(documents: Documents | None, batch: int, tokens: int, length: int, device: torch.device) -> _Sight:
    pad = -tokens % length
    if documents is None:
        first_BT = torch.zeros(batch, tokens + pad, dtype=torch.int64, device=device)
    else:
        first_BT = documents.first_BT.long()
        first_BT = torch.cat([first_BT, first_BT[:, -1:].expand(-1, pad)], dim=1)
    first_BNC = first_BT.unflatten(1, (-1, length))
    place_NC = torch.arange(tokens + pad, device=device).unflatten(0, (-1, length))
    begins_N1 = place_NC[:, :1]
    read_BNCC = (place_NC.unsqueeze(1) >= first_BNC.unsqueeze(-1)) & (place_NC.unsqueeze(1) <= place_NC.unsqueeze(-1))
    enters_BNC = (first_BNC < begins_N1) | (first_BNC == 0)
    return _Sight(read_BNCC, enters_BNC, place_NC >= first_BNC[..., -1:])
