"""What a linear mixer writes to its state and forgets of it: the part in which mixers differ.

Letters: B batch, T tokens, D width, H heads, K key width, k decays a head (K or 1).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tidegate.model.initialisation import Draw
from tidegate.model.layers import Linear

__all__ = ["DeltaRule", "GLARule", "HGRN2Rule", "Rule", "ScalarRule", "Written"]


class Written(NamedTuple):
    """Arguments of `linear_attention`, but the values."""

    q_BTHK: torch.Tensor
    k_BTHK: torch.Tensor
    log_decay_BTHk: torch.Tensor
    """fp32: sums of a thousand of them are exponents."""
    beta_BTH: torch.Tensor | None = None


class Rule(nn.Module):
    """Decays, and what becomes of queries and keys."""

    @abstractmethod
    def forward(self, x_BTD: torch.Tensor, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> Written:
        """What the layer's input (B, T, D) and its queries and keys (B, T, H, K) come to."""


class _LowRank(nn.Module):
    """`W2 W1 x`."""

    def __init__(self, width: int, rank: int, out_dim: int, std: float) -> None:
        super().__init__()
        self.w1, self.w2 = Linear(width, rank, std), Linear(rank, out_dim, std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x))


class GLARule(Rule):
    """A decay a channel, `sigmoid(W2 W1 x + b)^(1 / 16)` (arXiv 2312.06635, section 4.4)."""

    _ROOT = 16.0

    def __init__(self, width: int, num_heads: int, key_dim: int, rank: int, std: float) -> None:
        super().__init__()
        self.shape = (num_heads, key_dim)
        self.scores = _LowRank(width, rank, num_heads * key_dim, std)
        self.bias = nn.Parameter(torch.empty(num_heads * key_dim))

    def init_weights(self, draw: Draw) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: torch.Tensor, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> Written:
        scores = self.scores(x_BTD).float() + self.bias.float()
        return Written(q_BTHK, k_BTHK, F.logsigmoid(scores).unflatten(-1, self.shape) / self._ROOT)


class HGRN2Rule(Rule):
    """A forget gate f a channel that is also the key, `1 - f` (arXiv 2404.07904).

    f is at least `layer / num_layers`, so that deeper layers remember for longer; the paper learns these bounds and
    begins with them.
    """

    def __init__(self, width: int, num_heads: int, key_dim: int, layer: int, num_layers: int, std: float) -> None:
        super().__init__()
        self.shape, self.least = (num_heads, key_dim), layer / num_layers
        self.scores = Linear(width, num_heads * key_dim, std)

    def forward(self, x_BTD: torch.Tensor, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> Written:
        scores = self.scores(x_BTD).float().unflatten(-1, self.shape)
        # 1 - f in closed form: of f near 1 the difference would have no digits left.
        keys = (1 - self.least) * torch.sigmoid(-scores)
        return Written(q_BTHK, keys.to(q_BTHK.dtype), torch.log1p(-keys))


class ScalarRule(Rule):
    """A decay a head: `sigmoid(w x + b)` as in mLSTM with sigmoid gates (arXiv 2503.14376) and in Mamba-2's class, or
    fixed, `1 - 2^(-5 - h)`, as in RetNet (arXiv 2307.08621, section 2.1).

    Args:
        fixed: the decays do not hang on x.
        input_gate: keys are scaled by a sigmoid of x too, which begins nearly closed.
    """

    def __init__(self, width: int, num_heads: int, fixed: bool, input_gate: bool, std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.forget = None if fixed else Linear(width, num_heads, std)
        self.forget_bias = None if fixed else nn.Parameter(torch.empty(num_heads))
        self.write = Linear(width, num_heads, std) if input_gate else None
        self.write_bias = nn.Parameter(torch.empty(num_heads)) if input_gate else None

    def init_weights(self, draw: Draw) -> None:
        with torch.no_grad():
            if self.forget_bias is not None:
                self.forget_bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))
            if self.write_bias is not None:
                self.write_bias.fill_(-10.0)

    def forward(self, x_BTD: torch.Tensor, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> Written:
        if self.forget is None or self.forget_bias is None:
            heads_H = torch.arange(self.num_heads, device=x_BTD.device, dtype=torch.float32)
            decay_BTH = torch.log1p(-(2.0 ** (-5 - heads_H))).expand(*x_BTD.shape[:2], -1)
        else:
            decay_BTH = F.logsigmoid(self.forget(x_BTD).float() + self.forget_bias.float())
        if self.write is not None and self.write_bias is not None:
            opened_BTH = torch.sigmoid(self.write(x_BTD).float() + self.write_bias.float())
            k_BTHK = k_BTHK * opened_BTH.unsqueeze(-1).to(k_BTHK.dtype)
        return Written(q_BTHK, k_BTHK, decay_BTH.unsqueeze(-1))


class DeltaRule(Rule):
    """Keys of length 1 whose values are replaced by a share `beta = sigmoid(w x)`, and decays a channel (Kimi Delta
    Attention, arXiv 2510.26692) or a head (Gated DeltaNet, arXiv 2412.06464).

    A log decay is `-exp(A) softplus(z + b)`, or with a bound `bound sigmoid(exp(A) (z + b))`.

    Args:
        rank: of the scores z, one a channel; None for one a head.
        bound: below 0; no token forgets more than exp of it.
    """

    _RATES, _STEPS = (1.0, 16.0), (1e-3, 0.1)  # between which exp(A) and softplus(b) begin

    def __init__(
        self, width: int, num_heads: int, key_dim: int, rank: int | None, bound: float | None, std: float
    ) -> None:
        super().__init__()
        self.bound, self.shape = bound, (num_heads, 1 if rank is None else key_dim)
        out_dim = self.shape[0] * self.shape[1]
        self.scores = Linear(width, out_dim, std) if rank is None else _LowRank(width, rank, out_dim, std)
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.step_bias = nn.Parameter(torch.empty(out_dim))
        self.beta = Linear(width, num_heads, std)

    def init_weights(self, draw: Draw) -> None:
        with torch.no_grad():
            low, high = self._RATES
            self.log_rate.copy_((low + (high - low) * _uniform(draw, self.log_rate, "log_rate")).log())
            least, most = map(math.log, self._STEPS)
            steps = (least + (most - least) * _uniform(draw, self.step_bias, "step_bias")).exp()
            self.step_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step

    def forward(self, x_BTD: torch.Tensor, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> Written:
        scores = (self.scores(x_BTD).float() + self.step_bias.float()).unflatten(-1, self.shape)
        rate_H1 = self.log_rate.float().exp().unsqueeze(-1)
        if self.bound is None:
            log_decay = -rate_H1 * F.softplus(scores)
        else:
            log_decay = self.bound * torch.sigmoid(rate_H1 * scores)
        q_BTHK, k_BTHK = (F.normalize(x.float(), dim=-1, eps=1e-6).to(x.dtype) for x in (q_BTHK, k_BTHK))
        return Written(q_BTHK, k_BTHK, log_decay, torch.sigmoid(self.beta(x_BTD)))


def _uniform(draw: Draw, like: torch.Tensor, name: str) -> torch.Tensor:
    """Between 0 and 1, of the shape of `like`."""
    normal = torch.empty_like(like, dtype=torch.float32)
    draw.normal_(normal, 1.0, name)
    return torch.special.ndtr(normal)
