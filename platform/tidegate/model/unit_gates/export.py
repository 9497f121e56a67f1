"""Cut a masked model down to what its mask keeps: a smaller decoder with the same outputs.

Letters: U units, H query heads, G key/value heads, d head width, E experts, F hidden width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tidegate.model.activations import is_gated
from tidegate.model.attention import Attention
from tidegate.model.decoder import Decoder
from tidegate.model.layers import FeedForward
from tidegate.model.moe import MoE, RoutingStats
from tidegate.model.routers import RouterContext, Routing
from tidegate.model.routers.top_k import TopKRouter
from tidegate.model.unit_gates.units import NO_MASKS, LayerMasks

__all__ = ["CutMoE", "export"]


def export(decoder: Decoder, mask_U: torch.Tensor | None = None) -> Decoder:
    """The model without the units that the mask drops, in evaluation mode, on the same device and in the same dtype.

    Args:
        decoder: with unit gates and all its experts.
        mask_U: (U,) 0/1; None is the hard mask of its gates.

    Returns:
        A decoder whose losses and statistics are those of the masked one, up to rounding. Its `config` is still that
        of the whole model; statistics number experts as the whole model does.

    Raises:
        ValueError: the decoder has no unit gates, or only a share of the experts.
    """
    if decoder.units is None:
        raise ValueError("model.units=None: the model has no unit gates to export by")
    for held in decoder.blocks:
        if isinstance(held.ffn, MoE) and held.ffn.experts.num_experts != held.ffn.config.num_slices:
            raise ValueError(
                f"this rank holds {held.ffn.experts.num_experts} of {held.ffn.config.num_slices} experts; "
                "export from a process with parallel.expert=1"
            )
    masks = decoder.units.units.split(decoder.units.hard_mask() if mask_U is None else mask_U)
    with torch.device("meta"):
        smaller = Decoder(decoder.config.model_copy(update={"units": None}), CutMoE)
    state = {name: value.detach().clone() for name, value in decoder.state_dict().items()}
    smaller.load_state_dict({k: v for k, v in state.items() if not k.startswith("units.")}, assign=True)
    kept: list[nn.Module] = []
    block: Any
    for block, layer in zip(smaller.blocks, masks, strict=True):
        if layer.block is not None and not layer.block.any():
            continue
        kept.append(block)
        if layer.heads is not None:
            _cut_heads(block.attention, _kept(layer.heads))
        if isinstance(block.ffn, CutMoE):
            block.ffn.cut(layer)
        elif layer.channels is not None:
            _cut_channels(block.ffn, _kept(layer.channels))
    smaller.blocks = nn.ModuleList(kept)
    return smaller.eval()


def _kept(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero().flatten()


def _rows(parameter: nn.Parameter, index: torch.Tensor, dim: int = 0) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index))


def _cut_heads(attention: Attention, heads: torch.Tensor) -> None:
    """Keep query heads, and the key/value heads that they use."""
    config, d = attention.config, attention.config.head_dim
    key_of_head, value_of_head = (
        heads // (config.num_heads // each) for each in (config.num_kv_heads, config.value_heads)
    )
    keys, attention.key_of_head = key_of_head.unique(sorted=True, return_inverse=True)
    values, attention.value_of_head = value_of_head.unique(sorted=True, return_inverse=True)

    def features(index: torch.Tensor, width: int = d) -> torch.Tensor:
        return (index[:, None] * width + torch.arange(width, device=index.device)).flatten()

    queries = attention.makes_queries
    queries.weight = _rows(queries.weight, features(heads))
    attention.wk.weight = _rows(attention.wk.weight, features(keys))
    attention.wv.weight = _rows(attention.wv.weight, features(values))
    attention.wo.weight = _rows(attention.wo.weight, features(heads), dim=1)
    if attention.sink is not None:
        attention.sink = _rows(attention.sink, heads)
    gate = attention.gate
    if gate is None or gate.config.kind == "dense_output":
        return
    gated = features({"key": keys, "value": values}.get(gate.config.kind, heads), gate.score_dim)
    if gate.projection is not None:
        gate.projection.weight = _rows(gate.projection.weight, gated)
    if gate.constant is not None:
        gate.constant = _rows(gate.constant, gated)
    gate.num_heads = gated.numel() // gate.score_dim


def _cut_channels(ffn: FeedForward, channels: torch.Tensor) -> None:
    ffn.w1.weight = _rows(ffn.w1.weight, channels)
    if ffn.w3 is not None:
        ffn.w3.weight = _rows(ffn.w3.weight, channels)
    ffn.w2.weight = _rows(ffn.w2.weight, channels, dim=1)


class CutMoE(MoE):
    """`MoE` that may have lost experts; its statistics still number them as before."""

    kept_experts: torch.Tensor | None = None
    """(kept,) which of the E experts are left; None is all."""
    all_experts: int

    def cut(self, masks: LayerMasks) -> None:
        """Keep what the masks keep."""
        self.all_experts = self.config.num_experts
        if masks.channels is not None:
            assert self.shared_experts is not None
            _cut_channels(self.shared_experts, _kept(masks.channels))
        if masks.expert_channels is not None:
            columns_EF = torch.stack([_kept(row_F) for row_F in masks.expert_channels])
            experts = self.experts
            for name in ("w1", "w3") if is_gated(experts.activation) else ("w1",):
                weight_EFD = getattr(experts, name).detach()
                index = columns_EF.unsqueeze(-1).expand(-1, -1, weight_EFD.shape[-1])
                setattr(experts, name, nn.Parameter(weight_EFD.gather(1, index)))
            index = columns_EF.unsqueeze(1).expand(-1, experts.w2.shape[1], -1)
            experts.w2 = nn.Parameter(experts.w2.detach().gather(2, index))
            self.config = self.config.model_copy(update={"expert_dim": columns_EF.shape[1]})
        if masks.experts is not None:
            self.kept_experts = _kept(masks.experts)
            for name, weight in list(self.experts.named_parameters()):
                setattr(self.experts, name, _rows(weight, self.kept_experts))
            assert isinstance(self.router, TopKRouter)
            self.router.weight = _rows(self.router.weight, self.kept_experts)
            self.router.expert_bias = self.router.expert_bias[self.kept_experts]
            self.experts.num_experts = self.kept_experts.numel()
            self.config = self.config.model_copy(update={"num_experts": self.kept_experts.numel()})

    def forward(
        self,
        x_BTD: torch.Tensor,
        context: RouterContext,
        routing: Routing | None = None,
        masks: LayerMasks = NO_MASKS,
    ) -> tuple[torch.Tensor, RoutingStats]:
        y_BTD, stats = super().forward(x_BTD, context, routing, masks)
        kept = self.kept_experts
        if kept is None:
            return y_BTD, stats

        def widened(field_Be: torch.Tensor) -> torch.Tensor:
            wide_BE = field_Be.new_zeros(field_Be.shape[0], self.all_experts)
            return wide_BE.index_copy(1, kept, field_Be)

        return y_BTD, stats._replace(counts_BE=widened(stats.counts_BE), prob_sums_BE=widened(stats.prob_sums_BE))
