"""The language model: pre-norm blocks of attention and a feed-forward that is dense or a mixture of experts.

Letters: A blocks, L MoE layers, B sequences, T tokens, D width, H heads, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from torch.utils.checkpoint import checkpoint

from tidegate.config import Config
from tidegate.model.activations import ActivationName
from tidegate.model.attention import Attention, AttentionConfig, AttentionOutput, KeysValues, Rotary, rotary_table
from tidegate.model.clock import STILL, Clock, derive_key, uniform
from tidegate.model.consistency import symmetric_divergence, with_consistency
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Embedding, FeedForward, Linear
from tidegate.model.mixers import (
    GAM,
    GMU,
    CrossAttention,
    CrossAttentionConfig,
    DynamicMaskAttention,
    DynamicMaskConfig,
    GMUConfig,
    LinearMixer,
    Place,
    SlidingWindowConfig,
)
from tidegate.model.moe import MoE, MoEConfig, RoutingStats
from tidegate.model.norms import NormConfig, RMSNormConfig
from tidegate.model.observations import AttentionObservations, AttentionSample, AttentionWatch
from tidegate.model.routers import Observe, Router, RouterContext, RouterShape, Routing, ThorConfig
from tidegate.model.routers.top_k import TopKConfig
from tidegate.model.self_tuning import BestResponse, SelfTuneConfig, Tuned
from tidegate.model.sequence import SequencePart, SequenceRanks, passed_on
from tidegate.model.stack import StackConfig
from tidegate.model.unit_gates import UnitGates, UnitGatesConfig
from tidegate.model.unit_gates.units import NO_MASKS, LayerMasks
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "NO_LABEL",
    "Block",
    "BlockOutput",
    "Decoder",
    "DecoderOutput",
    "DenseConfig",
    "MoEFactory",
    "ModelConfig",
    "materialize",
    "unit_gates_on_meta",
]

NO_LABEL = -100
"""No token's id; as a label it has no loss. What does not count has weight 0 whatever its label."""

MoEFactory = Callable[..., MoE]
"""Takes the arguments of `MoE`; `parallel/` passes one that spreads experts over ranks."""


class DenseConfig(Config):
    kind: Literal["dense"] = "dense"
    hidden_dim: int = Field(ge=1)
    activation: ActivationName = "swiglu"


class ModelConfig(StackConfig):
    vocab_size: int = Field(ge=2)
    width: int = Field(ge=8, multiple_of=8)
    attention: AttentionConfig
    """Of the blocks that attend, whether to all tokens or to a window."""
    ffn: Annotated[MoEConfig | DenseConfig, Field(discriminator="kind")]
    norm: NormConfig = RMSNormConfig()
    """Of every block's inputs and of the last hidden state; QK-norm is plain RMSNorm."""
    units: UnitGatesConfig | None = None
    """Gates over parts of the model under a budget."""
    self_tune: SelfTuneConfig | None = None
    """Hyperparameters that move during the run, by a held-out loss (docs/self_tuning.md)."""
    tie_embeddings: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    """Of every matrix; those that write to the residual stream get init_std / sqrt(2 num_layers) (GPT-2)."""

    def __hash__(self) -> int:  # pydantic's own does not take the mapping
        return hash(self.model_dump_json())

    @property
    def out_std(self) -> float:
        return self.init_std / (2 * self.num_layers) ** 0.5

    @model_validator(mode="after")
    def _units_are_of_like_blocks(self) -> ModelConfig:
        if self.mixers and self.units is not None:
            raise ValueError(
                f"units.over={list(self.units.over)} with layers={self.layers!r}: unit gates are for models whose "
                "blocks are alike; remove units or layers"
            )
        return self

    @model_validator(mode="after")
    def _keys_are_of_one_block(self) -> ModelConfig:
        kind, clip = self.attention.gate.kind, self.attention.qk_clip
        if self.cross_attention and kind in ("key", "value"):
            raise ValueError(
                f"attention.gate.kind={kind} with layers={self.layers!r}: blocks of cross attention have no keys and "
                "values to gate; use another gate"
            )
        if self.cross_attention and clip is not None:
            raise ValueError(
                f"attention.qk_clip={clip:g} with layers={self.layers!r}: it scales a block's own keys, which cross "
                "attention has not; use attention.qk_norm"
            )
        return self

    @model_validator(mode="after")
    def _units_fit(self) -> ModelConfig:
        if self.units is not None:
            unit_gates_on_meta(self)
        return self

    @model_validator(mode="after")
    def _self_tuning_fits(self) -> ModelConfig:
        if self.self_tune is None:
            return self
        tuned, moe = list(self.self_tune.tuned), self.ffn if isinstance(self.ffn, MoEConfig) else None
        if self.units is not None:
            raise ValueError(f"self_tune.tuned={tuned} and units.over={list(self.units.over)} both gate; use one")
        if moe is not None and moe.capabilities.double_forward:
            raise ValueError(
                f"self_tune.tuned={tuned} does not fit ffn.router.kind={moe.router.kind}, whose two passes a step "
                "would draw two perturbations"
            )
        routing = [name for name in ("temperature", "noise") if name in tuned]
        if routing and not (moe is not None and isinstance(moe.router, TopKConfig)):
            kind = self.ffn.kind if moe is None else moe.router.kind
            raise ValueError(f"self_tune.tuned.{routing[0]} acts on a top-k router's logits, not on {kind}; remove it")
        if "balance_scale" in tuned and (moe is None or not moe.capabilities.learned):
            raise ValueError("self_tune.tuned.balance_scale needs a router that learns; remove it")
        return self

    @model_validator(mode="after")
    def _there_is_a_block_before(self) -> ModelConfig:
        if isinstance(self.ffn, MoEConfig) and self.ffn.reads_previous_block and self.num_layers < 2:
            raise ValueError(
                f"ffn.router.reads=previous_block, but num_layers={self.num_layers} has no block before another"
            )
        return self


class DecoderOutput(NamedTuple):
    nll: torch.Tensor
    """() fp32, negative log-likelihood in nats, summed over the labels that count; carries gradient."""
    nll_B: torch.Tensor
    """(B,) fp32, the same of each sequence; no gradient."""
    stats: RoutingStats | None
    """Fields stacked over the MoE layers, (L, B, ...); None for a dense model."""
    attention: AttentionObservations | None = None
    """If observed; of the blocks that attend."""
    max_hidden_A: torch.Tensor | None = None
    """(A,) fp32, largest magnitude of the residual stream after each block, if observed; no gradient."""
    max_logit_AH: torch.Tensor | None = None
    """(A, H) fp32, largest attention logits of the batch: of every training pass with `qk_clip`, else None. A of the
    blocks that attend."""
    nll_BT: torch.Tensor | None = None
    """(B, T) fp32, of every label, whether it counts or not; no gradient."""
    unit_penalty: torch.Tensor | None = None
    """() fp32 of the unit gates, to be added to the loss as it is; None without gates."""
    tuned: Tuned = Tuned()
    """Hyperparameters of this pass."""


class Published(NamedTuple):
    """What later blocks read, of the nearest block that has it."""

    memory_BTC: torch.Tensor | None = None
    """Of a linear mixer, for GMUs."""
    keys: KeysValues | None = None
    """Of attention to all tokens, for cross attention."""


_NOTHING = Published()


class BlockOutput(NamedTuple):
    h_BTD: torch.Tensor
    """The residual stream before the feed-forward."""
    y_BTD: torch.Tensor
    """What the feed-forward adds to it: the next norm adds and normalises in one pass."""
    x_BTD: torch.Tensor
    """What the feed-forward read: a pre-gated router of the next block reads it too."""
    stats: RoutingStats | None
    sample: AttentionSample | None
    max_logit_H: torch.Tensor | None
    published: Published
    """By this block and those before."""


class _Mixed(NamedTuple):
    """What a block's token mixer returns."""

    y_BTD: torch.Tensor
    sample: AttentionSample | None
    max_logit_H: torch.Tensor | None
    published: Published


class Block(nn.Module):
    """`h += mixer(norm(h)); h += ffn(norm(h))`, where the mixer is attention or one of `ModelConfig.mixers`."""

    def __init__(self, config: ModelConfig, moe: MoEFactory, layer: int) -> None:
        super().__init__()
        std, out_std = config.init_std, config.out_std
        self.attention_norm = config.norm.build(config.width, config.norm_eps, std)
        """Of the mixer's input, whichever it is."""
        self.attention: Attention | None = None
        self.mixer: LinearMixer | GAM | GMU | None = None
        self._publishes = layer in config.publishing
        mixer = config.mixers.get(config.schedule[layer])
        if mixer is None or isinstance(mixer, SlidingWindowConfig):
            window = None if mixer is None else mixer.window
            self.attention = Attention(config.attention, config.width, config.norm_eps, std, out_std, window)
        elif isinstance(mixer, DynamicMaskConfig):
            given = config.attention, config.width, config.norm_eps, std, out_std
            self.attention = DynamicMaskAttention(*given, mixer.keep)
        elif isinstance(mixer, CrossAttentionConfig):
            self.attention = CrossAttention(config.attention, config.width, config.norm_eps, std, out_std)
        else:
            place = Place(config.width, config.norm_eps, std, out_std, layer, config.num_layers)
            if isinstance(mixer, GMUConfig):
                source = config.publisher(layer)
                assert source is not None
                self.mixer = mixer.build(place, config.memory_channels(source))
            else:
                self.mixer = mixer.build(place)
        self.ffn_norm = config.norm.build(config.width, config.norm_eps, std)
        self.ffn: MoE | FeedForward
        if isinstance(config.ffn, MoEConfig):
            self.ffn = moe(config.ffn, config.width, std, out_std, layer=layer, vocab_size=config.vocab_size)
        else:
            self.ffn = FeedForward(config.width, config.ffn.hidden_dim, std, out_std, config.ffn.activation)
        self._dropout_key = derive_key("dropout", layer)

    def forward(
        self,
        h_BTD: torch.Tensor,
        y_BTD: torch.Tensor | None,
        rotary: Rotary,
        context: RouterContext,
        source_BTD: torch.Tensor | None = None,
        routing: Routing | None = None,
        units: LayerMasks = NO_MASKS,
        below: Published = _NOTHING,
    ) -> BlockOutput:
        """Run the block.

        Args:
            h_BTD: (B, T, D) residual stream.
            y_BTD: what the block before adds to it, or None.
            rotary: tables for T positions.
            context: the batch.
            source_BTD: what a pre-gated router reads in place of this block's own input.
            routing: decided elsewhere.
            units: factors of the layer's gated units.
            below: published by the blocks before.
        """
        share = None if units.block is None else units.block.to(h_BTD.dtype)
        if y_BTD is None:
            x_BTD = self.attention_norm(h_BTD)
        else:
            x_BTD, h_BTD = self.attention_norm.add(y_BTD, h_BTD)
        mixed = self._mixed(x_BTD, rotary, context, units, below)
        seen = mixed[1:]
        x_BTD, h_BTD = self.ffn_norm.add(_shared(mixed.y_BTD, share), h_BTD)
        if not isinstance(self.ffn, MoE):
            y_BTD = self._dropped(self.ffn(x_BTD, units.channels), context)
            return BlockOutput(h_BTD, _shared(y_BTD, share), x_BTD, None, *seen)
        context = context._replace(log_experts=units.log_experts())
        if routing is None and source_BTD is not None:
            routing = self.ffn.route(source_BTD, context)
        routed_BTD, stats = self.ffn(x_BTD, context, routing, units)
        if units.block is not None:  # a dropped block's router has nothing to balance
            weight = units.block.detach().mean()
            stats = stats._replace(
                prob_sums_BE=stats.prob_sums_BE * weight,
                z_sums_B=stats.z_sums_B * weight,
                penalty_sums_B=stats.penalty_sums_B * weight,
            )
        return BlockOutput(h_BTD, _shared(self._dropped(routed_BTD, context), share), x_BTD, stats, *seen)

    def _mixed(
        self,
        x_BTD: torch.Tensor,
        rotary: Rotary,
        context: RouterContext,
        units: LayerMasks,
        below: Published,
    ) -> _Mixed:
        if isinstance(self.mixer, GMU):
            assert below.memory_BTC is not None  # the config has seen to it
            return _Mixed(self.mixer(x_BTD, below.memory_BTC), None, None, below)
        if self.mixer is not None:
            if context.part is None:
                output = self.mixer(x_BTD, context.documents)
            else:
                output = passed_on(self.mixer, x_BTD, context.documents, context.part)
            published = below._replace(memory_BTC=output.memory_BTC) if self._publishes else below
            return _Mixed(output.y_BTD, None, None, published)
        assert self.attention is not None
        observe = context.observe == "all" and context.part is None
        attended: AttentionOutput = self.attention(
            x_BTD, rotary, context.documents, observe, units.heads, below.keys, context.part
        )
        if self._publishes:  # a copy: values are a view of a tensor that holds queries and scores of the gate too
            below = below._replace(keys=KeysValues(attended.keys.k_BTGd, attended.keys.v_BTVd.contiguous()))
        return _Mixed(attended.y_BTD, attended.sample, attended.max_logit_H, below)

    def _dropped(self, y_BTD: torch.Tensor, context: RouterContext) -> torch.Tensor:
        """Dropout at the rate that the model tunes itself, in training."""
        rate = context.tuned.dropout
        if rate is None or not self.training or context.clock.step == 0:
            return y_BTD
        draws_ND = uniform(context.rows_N, y_BTD.shape[-1], context.clock.key ^ self._dropout_key)
        return y_BTD * ((draws_ND >= rate) / (1 - rate)).view_as(y_BTD).to(y_BTD.dtype)


def _shared(y_BTD: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    """What a block adds, of which a unit gate lets a share through."""
    return y_BTD if share is None else share * y_BTD


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
        self._attends = bool(config.windows)
        self.embedding = Embedding(config.vocab_size, config.width, config.init_std)
        self.router = _shared_router(config)
        self.blocks = nn.ModuleList(Block(config, moe, layer) for layer in range(config.num_layers))
        self.norm = config.norm.build(config.width, config.norm_eps, config.init_std)
        self.units: UnitGates | None = None
        if config.units is not None:
            self.units = config.units.build(config, _block_on_meta(config))
        self.self_tuning: BestResponse | None = None
        if config.self_tune is not None:
            self.self_tuning = config.self_tune.build(_gate_shapes(config))
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, config.init_std)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer; the values depend on the seed and on names, not on the world size."""
        for name, module in self.named_modules():
            if module is not self and hasattr(module, "init_weights"):
                module.init_weights(Draw(seed, name))

    def routers(self) -> list[Router]:
        """One a layer, in order, or the one of all layers; none if dense."""
        # Asked for every step: not by a walk over all modules.
        layers = (module.router for block in self.blocks for module in block.children() if isinstance(module, MoE))
        return [router for router in (self.router, *layers) if router is not None]

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        counted_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        *,
        sequences_B: torch.Tensor | None = None,
        clock: Clock = STILL,
        observe: Observe | None = None,
        sequence_ranks: SequenceRanks | None = None,
    ) -> DecoderOutput:
        """Score the labels.

        Args:
            tokens_BT: (B, T) int64 inputs.
            labels_BT: (B, T) int64 next tokens.
            counted_BT: (B, T) bool; where False, neither the loss nor the routing statistics count the token.
            documents_BT: (B, T) document ids, each a run of equal ones; attention stays inside. None attends across.
            sequences_B: (B,) int64 place of each sequence in the global batch, for draws; None counts from 0.
            clock: the optimizer step this pass belongs to; annealing and noise follow it in training mode.
            observe: compute what only telemetry wants.
            sequence_ranks: ranks that hold other tokens of the same sequences; `documents_BT` is of all of them then,
                and attention is not observed.
        """
        documents, part = None if documents_BT is None else Documents(documents_BT), None
        if sequence_ranks is not None:
            part = SequencePart(sequence_ranks, tokens_BT.shape[1] * sequence_ranks.count, documents)
            documents = None if documents_BT is None else Documents(sequence_ranks.own(documents_BT, 1))
        if sequences_B is None:
            sequences_B = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)
        context = RouterContext(counted_BT, tokens_BT, sequences_B, clock, documents, observe, part=part)
        passed = self._run(context)
        stats = passed.stats
        router = self.config.ffn.router if isinstance(self.config.ffn, MoEConfig) else None
        if isinstance(router, ThorConfig) and self.training and torch.is_grad_enabled():
            again = context._replace(clock=clock.other("second pass"), observe=None)
            other = self._run(again)
            # The divergence needs both passes' logits at once.
            logits_BTV, other_BTV = (F.linear(each.x_BTD, self._head()) for each in (passed, other))
            nll_BT = (_nll(logits_BTV, labels_BT) + _nll(other_BTV, labels_BT)) / 2
            nll = (nll_BT * counted_BT).sum()
            divergence_BT = symmetric_divergence(logits_BTV, other_BTV)
            # The paper adds two cross entropies and alpha times the divergence; all of it is halved here, so that the
            # loss stays nats a token.
            consistency_B = router.consistency / 2 * (divergence_BT * counted_BT).sum(dim=1)
            stats = with_consistency(passed.stats, other.stats, consistency_B)
            if passed.max_logit_AH is not None and other.max_logit_AH is not None:
                passed = passed._replace(max_logit_AH=torch.maximum(passed.max_logit_AH, other.max_logit_AH))
        else:
            nll, nll_N = linear_cross_entropy(
                passed.x_BTD.flatten(0, 1),
                self._head(),
                labels_BT.flatten(),
                counted_BT.flatten().float(),
                z_loss=0.0,
                soft_cap=None,
                ignore_index=NO_LABEL,
            )
            nll_BT = nll_N.view_as(labels_BT)
        nll_BT = nll_BT.detach()
        nll_B = (nll_BT * counted_BT).sum(dim=1)
        seen = passed.attention, passed.max_hidden_A, passed.max_logit_AH
        return DecoderOutput(nll, nll_B, stats, *seen, nll_BT, passed.unit_penalty, passed.tuned)

    def logits(
        self,
        tokens_BT: torch.Tensor,
        counted_BT: torch.Tensor,
        place: int | slice | torch.Tensor,
        documents_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, V) fp32, of the token after the one at this place; (B, T, V) of a slice, (N, V) of N places.

        Args:
            tokens_BT: (B, T) int64; those after the place have no say, except where the router sees later tokens.
            counted_BT: (B, T) bool, as in `forward`.
            place: 0 <= place < T, or some of them, of every sequence; or (B, T) bool.
            documents_BT: as in `forward`.
        """
        documents = None if documents_BT is None else Documents(documents_BT)
        rows_B = torch.arange(len(tokens_BT), device=tokens_BT.device)
        x_BTD = self._run(RouterContext(counted_BT, tokens_BT, rows_B, STILL, documents)).x_BTD
        x_ND = x_BTD[place] if isinstance(place, torch.Tensor) else x_BTD[:, place]
        return F.linear(x_ND, self._head()).float()

    def _head(self) -> torch.Tensor:
        """(V, D)."""
        weight: torch.Tensor = self.embedding.weight if self.head is None else self.head.weight
        return weight

    def _run(self, context: RouterContext) -> _Pass:
        attention, part = self.config.attention, context.part
        tokens_BT = context.tokens_BT
        length = tokens_BT.shape[1] if part is None else part.length
        rotary = rotary_table(length, attention.head_dim, attention.rope_theta, tokens_BT.device, attention.yarn)
        if part is not None:
            rotary = Rotary(*(part.ranks.own(table, 0) for table in rotary))
        h_BTD = self.embedding(tokens_BT)
        units = None if self.units is None else self.units(h_BTD, context.clock)
        masks = [NO_MASKS] * len(self.blocks) if units is None else units.masks
        if self.self_tuning is not None:
            context, masks = self._respond(context)
        routing = None if self.router is None else self.router(h_BTD.flatten(0, 1), context)
        pre_gated = isinstance(self.config.ffn, MoEConfig) and self.config.ffn.reads_previous_block
        source_BTD: torch.Tensor | None = None
        y_BTD: torch.Tensor | None = None
        published = _NOTHING
        recompute = self.recompute and self.training
        stats: list[RoutingStats] = []
        watch: AttentionWatch | None = None
        if context.observe == "all" and self._attends and part is None:
            frees = self.recompute or not torch.is_grad_enabled()
            watch = AttentionWatch(attention.gate, tokens_BT, context.documents, copies=frees)
        largest_logits: list[torch.Tensor] = []
        extremes: list[torch.Tensor] = []
        for block, layer_masks in zip(self.blocks, masks, strict=True):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            if recompute and y_BTD is not None:  # so that one tensor is kept for each block, not two
                h_BTD, y_BTD = h_BTD + y_BTD, None
            h_BTD, y_BTD, x_BTD, layer_stats, sample, max_logit_H, published = run(
                h_BTD, y_BTD, rotary, context, source_BTD, routing, layer_masks, published
            )
            source_BTD = x_BTD if pre_gated else None
            if layer_stats is not None:
                stats.append(layer_stats)
            if max_logit_H is not None:
                largest_logits.append(max_logit_H)
            if watch is not None and sample is not None:
                watch.see(sample)
            if context.observe == "all":
                # One pass; a norm takes twenty times as long on a CPU.
                extremes += torch.aminmax((h_BTD + y_BTD).detach())
        penalty = None if units is None else units.penalty
        seen = None if watch is None else watch.read()
        largest_A = torch.stack(extremes).view(-1, 2).abs().amax(dim=1).float() if extremes else None
        logits_AH = torch.stack(largest_logits) if largest_logits else None
        assert y_BTD is not None  # there is a block at least
        x_BTD, _ = self.norm.add(y_BTD, h_BTD)
        return _Pass(x_BTD, _stacked(stats), seen, largest_A, logits_AH, penalty, context.tuned)

    def _respond(self, context: RouterContext) -> tuple[RouterContext, list[LayerMasks]]:
        """The pass's hyperparameters, and each layer's gates that respond to them."""
        assert self.self_tuning is not None
        assert self.config.self_tune is not None
        response = self.self_tuning(context.clock)
        parts = {place: gates.unbind() for place, gates in response.gates.items()}
        masks = [LayerMasks(**{p: layers[i] for p, layers in parts.items()}) for i in range(len(self.blocks))]
        return context._replace(tuned=self.config.self_tune.values(response.point_H)), masks


class _Pass(NamedTuple):
    x_BTD: torch.Tensor
    """What the head reads."""
    stats: RoutingStats | None
    attention: AttentionObservations | None
    max_hidden_A: torch.Tensor | None
    max_logit_AH: torch.Tensor | None
    unit_penalty: torch.Tensor | None
    tuned: Tuned


def _gate_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of all hidden units of the feed-forwards, under the names of `LayerMasks`."""
    ffn, layers = config.ffn, config.num_layers
    if isinstance(ffn, DenseConfig):
        return {"channels": (layers, ffn.hidden_dim)}
    shapes: dict[str, tuple[int, ...]] = {"expert_channels": (layers, ffn.num_slices, ffn.expert_dim)}
    if ffn.shared.num:
        shapes["channels"] = (layers, ffn.shared.num * ffn.expert_dim)
    return shapes


def _shared_router(config: ModelConfig) -> Router | None:
    """The router of all layers, if the job has one."""
    ffn = config.ffn
    if not isinstance(ffn, MoEConfig) or ffn.capabilities.source_layer != "embedding":
        return None
    shape = RouterShape(config.width, ffn.num_experts, ffn.top_k, config.init_std, 0, config.vocab_size)
    return ffn.router.build(shape)


def _stacked(layers: list[RoutingStats]) -> RoutingStats | None:
    if not layers:
        return None
    fields = (None if field[0] is None else torch.stack(field) for field in zip(*layers, strict=True))
    return RoutingStats(*fields)  # type: ignore[arg-type]  # fields are None in every layer or in none


def _nll(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    nll_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="none")
    return nll_N.view_as(labels_BT)


def unit_gates_on_meta(config: ModelConfig) -> UnitGates:
    """The model's unit gates without values: what they are over and what that costs.

    Raises:
        ValueError: they do not fit the model, see `UnitGatesConfig.build`.
    """
    assert config.units is not None
    with torch.device("meta"):
        return config.units.build(config, _block_on_meta(config))


def _block_on_meta(config: ModelConfig) -> Block:
    """A block with all its experts, to count parameters in."""
    with torch.device("meta"):
        return Block(config, MoE, layer=0)


def materialize(build: Callable[[], Decoder], device: torch.device, seed: int) -> Decoder:
    """Build on `meta`, allocate on `device`, fill: no rank ever holds more than its own share."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    model.init_weights(seed)
    return model
