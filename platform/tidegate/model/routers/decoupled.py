"""One router for all layers, apart from them: a small causal transformer on the embeddings decides once a token.

All layers use the same experts with the same weights, so that they are known before the first block begins. Source:
Read-ME, Cai et al., NeurIPS 2024 (arXiv 2410.19123), Eq. 1, where a router of one transformer layer is distilled from
a dense model; here it is trained with the model. Each layer's balance loss sees the one decision.

Letters: N rows, B sequences, T tokens, D width, R router width, E experts, K chosen experts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from tidegate.config import Variant
from tidegate.model.attention import Attention, AttentionConfig, rotary_table
from tidegate.model.gates import NoGate
from tidegate.model.initialisation import Draw
from tidegate.model.layers import FeedForward, Linear, RMSNorm
from tidegate.model.routers.base import Capabilities, Router, RouterContext, RouterShape, Routing
from tidegate_kernels.router_logits import router_logits

__all__ = ["DecoupledConfig", "DecoupledRouter"]

_NORM_EPS = 1e-6


class DecoupledConfig(Variant):
    kind: Literal["decoupled"] = "decoupled"
    summary: ClassVar[str] = "one small transformer on the embeddings routes for all layers at once"
    source: ClassVar[str] = "Read-ME, Cai et al., NeurIPS 2024, arXiv 2410.19123"
    capabilities: ClassVar[Capabilities] = Capabilities(source_layer="embedding")

    width: int = Field(default=512, ge=8, multiple_of=8)
    """R (512 in the paper)."""
    num_heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoupledConfig:
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} is not an even number of dimensions for num_heads={self.num_heads}")
        return self

    def build(self, shape: RouterShape) -> DecoupledRouter:
        return DecoupledRouter(self, shape)


class DecoupledRouter(Router):
    def __init__(self, config: DecoupledConfig, shape: RouterShape) -> None:
        super().__init__(shape)
        R = config.width
        attention = AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=R // config.num_heads,
            gate=NoGate(),
        )
        self.input = Linear(shape.width, R, shape.std)
        self.attention_norm = RMSNorm(R, _NORM_EPS)
        self.attention = Attention(attention, R, _NORM_EPS, shape.std, shape.std)
        self.ffn_norm = RMSNorm(R, _NORM_EPS)
        self.ffn = FeedForward(R, 2 * R, shape.std, shape.std)
        self.norm = RMSNorm(R, _NORM_EPS)
        self.weight = nn.Parameter(torch.empty(shape.num_experts, R))

    def init_weights(self, draw: Draw) -> None:
        draw.normal_(self.weight, self.std, "weight")  # the layers fill themselves

    def forward(self, x_ND: torch.Tensor, context: RouterContext) -> Routing:
        length = context.tokens_BT.shape[1]
        config = self.attention.config
        rotary = rotary_table(length, config.head_dim, config.rope_theta, x_ND.device)
        h_BTR = self.input(x_ND).unflatten(0, (-1, length))
        h_BTR = h_BTR + self.attention(self.attention_norm(h_BTR), rotary, context.documents)[0]
        h_BTR = h_BTR + self.ffn(self.ffn_norm(h_BTR))
        logits_NE = router_logits(self.norm(h_BTR).flatten(0, 1), self.weight)
        probs_NE = logits_NE.softmax(dim=-1)
        return self._best_of(probs_NE, probs_NE, logits_NE)
