"""DSelect-k: k selectors, each a smooth binary code over the experts that hardens into one expert.

A selector has ceil(log2 E) bits z = W x; expert i of selector j gets prod_b S(z_jb) or 1 - S(z_jb) by the bits of i,
with S the smooth step. The weights of the selectors are a softmax of another linear map. Training begins dense (every
code near 1/2) and an entropy term drives each selector to one expert; where E is no power of two, a second term keeps
mass away from the codes that name no expert. Source: Hazimeh et al., NeurIPS 2021 (arXiv 2106.03760), Eq. 4-7.

Letters: N rows, D width, E experts, K selectors, b bits.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from tidegate.config import Variant
from tidegate.model.initialisation import Draw
from tidegate.model.routers.base import Capabilities, Router, RouterContext, RouterShape, Routing
from tidegate.model.routers.smooth import dense_start_std, entropy, smooth_step

__all__ = ["DSelectK", "DSelectKConfig"]


class DSelectKConfig(Variant):
    kind: Literal["dselect_k"] = "dselect_k"
    summary: ClassVar[str] = "k smooth binary codes that harden into at most k experts"
    source: ClassVar[str] = "DSelect-k, Hazimeh et al., NeurIPS 2021, arXiv 2106.03760"
    capabilities: ClassVar[Capabilities] = Capabilities(ragged=True, dense_phase=True, z_loss=False)

    gamma: float = Field(default=1.0, gt=0)
    """Width of the smooth step: small hardens early."""
    entropy_weight: float = Field(default=0.1, ge=0)
    """Weight of the mean entropy of the selectors, nats a token."""
    unreachable_weight: float = Field(default=1.0, ge=0)
    """Weight of 1 / (mass on codes that name an expert), where E is no power of two."""

    def build(self, shape: RouterShape) -> DSelectK:
        return DSelectK(self, shape)


class DSelectK(Router):
    def __init__(self, config: DSelectKConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        self.config = config
        self.num_bits = max(1, math.ceil(math.log2(shape.num_experts)))
        self.code = nn.Parameter(torch.empty(shape.top_k * self.num_bits, shape.width))
        self.mixing = nn.Parameter(torch.empty(shape.top_k, shape.width))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.code, dense_start_std(self.config.gamma, self.shape.width), "code")
        draw.normal_(self.mixing, self.std, "mixing")

    def selectors(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, K, E) fp32: each selector's share of each expert; sums to 1 where E is a power of two."""
        z_NKb = F.linear(x_ND.float(), self.code.float()).unflatten(1, (self.top_k, self.num_bits))
        one_NKb1 = smooth_step(z_NKb, self.config.gamma).unsqueeze(-1)
        experts_E = torch.arange(self.num_experts, device=x_ND.device)
        bit_bE = (experts_E >> torch.arange(self.num_bits, device=x_ND.device)[:, None]) & 1
        return torch.where(bit_bE.bool(), one_NKb1, 1 - one_NKb1).prod(dim=2)

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        config = self.config
        shares_NKE = self.selectors(x_ND)
        mixing_NK = F.linear(x_ND.float(), self.mixing.float()).softmax(dim=-1)
        mass_NK = shares_NKE.sum(dim=-1)
        gate_NE = (mixing_NK.unsqueeze(-1) * shares_NKE).sum(dim=1)
        # Mass on codes that name no expert is lost while they are reachable; the weights of the rest sum to 1.
        gate_NE = gate_NE / gate_NE.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        penalty_N = config.entropy_weight * entropy(shares_NKE).mean(dim=-1)
        if self.num_experts < 2**self.num_bits:
            penalty_N = penalty_N + config.unreachable_weight * (1 / mass_NK.clamp(min=1e-3)).mean(dim=-1)
        routing = self._open_routing(gate_NE, gate_NE > 0, gate_NE, (gate_NE + 1e-6).log())
        return routing._replace(penalty_N=penalty_N)
