"""The language model: pre-norm blocks of attention and a feed-forward that is dense or a mixture of experts.

Letters: L MoE layers, B sequences, T tokens, D width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from tidegate.config import Config
from tidegate.model.attention import Attention, AttentionConfig, Rotary, document_mask, rotary_table
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Embedding, FeedForward, Linear, RMSNorm
from tidegate.model.moe import MoE, MoEConfig, RoutingStats

__all__ = ["Block", "Decoder", "DecoderOutput", "DenseConfig", "MoEFactory", "ModelConfig", "materialize"]

MoEFactory = Callable[[MoEConfig, int, float, float], MoE]
"""`(config, width, std, out_std) -> MoE`; `parallel/` passes one that spreads experts over ranks."""


class DenseConfig(Config):
    kind: Literal["dense"] = "dense"
    hidden_dim: int = Field(ge=1)


class ModelConfig(Config):
    vocab_size: int = Field(ge=2)
    width: int = Field(ge=8, multiple_of=8)
    num_layers: int = Field(ge=1)
    attention: AttentionConfig
    ffn: Annotated[MoEConfig | DenseConfig, Field(discriminator="kind")]
    tie_embeddings: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    """Of every matrix; those that write to the residual stream get init_std / sqrt(2 num_layers) (GPT-2)."""

    @property
    def out_std(self) -> float:
        return self.init_std / (2 * self.num_layers) ** 0.5


class DecoderOutput(NamedTuple):
    nll_B: torch.Tensor
    """(B,) fp32, negative log-likelihood in nats, summed over the labels of each sequence that count."""
    stats: RoutingStats | None
    """Fields stacked over the MoE layers, (L, B, ...); None for a dense model."""


class Block(nn.Module):
    """`h += attention(norm(h)); h += ffn(norm(h))`."""

    def __init__(self, config: ModelConfig, moe: MoEFactory) -> None:
        super().__init__()
        std, out_std = config.init_std, config.out_std
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config.attention, config.width, config.norm_eps, std, out_std)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn: MoE | FeedForward
        if isinstance(config.ffn, MoEConfig):
            self.ffn = moe(config.ffn, config.width, std, out_std)
        else:
            self.ffn = FeedForward(config.width, config.ffn.hidden_dim, std, out_std)

    def forward(
        self, h_BTD: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, counted_BT: torch.Tensor
    ) -> tuple[torch.Tensor, RoutingStats | None]:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), rotary, mask)
        x_BTD = self.ffn_norm(h_BTD)
        if isinstance(self.ffn, MoE):
            y_BTD, stats = self.ffn(x_BTD, counted_BT)
            return h_BTD + y_BTD, stats
        return h_BTD + self.ffn(x_BTD), None


class Decoder(nn.Module):
    """Embedding, blocks, final norm, language-model head and its loss.

    Args:
        config: the architecture.
        moe: builds the MoE layers; all experts local by default.
        recompute: run each block again in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig, moe: MoEFactory = MoE, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embedding = Embedding(config.vocab_size, config.width, config.init_std)
        self.blocks = nn.ModuleList(Block(config, moe) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, config.init_std)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer; the values depend on the seed and on names, not on the world size."""
        for name, module in self.named_modules():
            if module is not self and hasattr(module, "init_weights"):
                module.init_weights(Draw(seed, name))

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        counted_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
    ) -> DecoderOutput:
        """Score the labels.

        Args:
            tokens_BT: (B, T) int64 inputs.
            labels_BT: (B, T) int64 next tokens.
            counted_BT: (B, T) bool; where False, neither the loss nor the routing statistics count the token.
            documents_BT: (B, T) document ids; attention stays inside a document. None attends across.
        """
        attention = self.config.attention
        rotary = rotary_table(tokens_BT.shape[1], attention.head_dim, attention.rope_theta, tokens_BT.device)
        mask = None if documents_BT is None else document_mask(documents_BT)
        h_BTD = self.embedding(tokens_BT)
        stats: list[RoutingStats] = []
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.recompute and self.training else block
            h_BTD, layer_stats = run(h_BTD, rotary, mask, counted_BT)
            if layer_stats is not None:
                stats.append(layer_stats)
        head = self.embedding.weight if self.head is None else self.head.weight
        logits_BTV = F.linear(self.norm(h_BTD), head)
        nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="none").view_as(
            labels_BT
        )
        nll_B = (nll_BT * counted_BT).sum(dim=1)
        stacked = RoutingStats(*(torch.stack(field) for field in zip(*stats, strict=True))) if stats else None
        return DecoderOutput(nll_B, stacked)


def materialize(build: Callable[[], Decoder], device: torch.device, seed: int) -> Decoder:
    """Build on `meta`, allocate on `device`, fill: no rank ever holds more than its own share."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    model.init_weights(seed)
    return model
