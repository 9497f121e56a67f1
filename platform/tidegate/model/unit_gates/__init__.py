"""Gates over units of a model under an exact budget. A new method is a new file and one line in `UnitMethod`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from tidegate.config import Config
from tidegate.model.unit_gates.base import UnitGates, UnitPass
from tidegate.model.unit_gates.continuation import ContinuationConfig
from tidegate.model.unit_gates.dynamic_sparse import DynamicSparseConfig
from tidegate.model.unit_gates.hard_concrete import HardConcreteConfig
from tidegate.model.unit_gates.knapsack import KnapsackConfig
from tidegate.model.unit_gates.nested import NestedConfig
from tidegate.model.unit_gates.polarization import PolarizationConfig
from tidegate.model.unit_gates.random_mask import RandomMaskConfig
from tidegate.model.unit_gates.reinforce import ReinforceConfig
from tidegate.model.unit_gates.straight_through import StraightThroughConfig
from tidegate.model.unit_gates.units import Kind, LayerMasks, Units, groups_of

if TYPE_CHECKING:
    from tidegate.model.decoder import Block, ModelConfig
    from tidegate.model.moe import MoEConfig

__all__ = ["FIXED", "LayerMasks", "UnitGates", "UnitGatesConfig", "UnitMethod", "UnitPass", "Units"]

UnitMethod = Annotated[
    StraightThroughConfig
    | ReinforceConfig
    | HardConcreteConfig
    | PolarizationConfig
    | ContinuationConfig
    | KnapsackConfig
    | RandomMaskConfig
    | DynamicSparseConfig
    | NestedConfig,
    Field(discriminator="kind"),
]


FIXED = (RandomMaskConfig, NestedConfig)
"""Methods whose masks do not move, so that there is nothing to freeze."""


class UnitGatesConfig(Config):
    over: tuple[Kind, ...] = Field(min_length=1)
    """What is gated: query heads, hidden channels (of a dense feed-forward, or of shared and routed experts), routed
    experts, whole blocks."""
    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of the gated units' parameters that the hard mask keeps."""
    method: UnitMethod
    freeze_tokens: int | None = Field(default=None, ge=1)
    """The step that reaches this many tokens fixes the hard mask, and training goes on with it."""

    @model_validator(mode="after")
    def _freezes_what_moves(self) -> UnitGatesConfig:
        fixed = isinstance(self.method, FIXED)
        if fixed and self.freeze_tokens is not None:
            raise ValueError(
                f"freeze_tokens={self.freeze_tokens} does not fit method.kind={self.method.kind}, whose masks do not "
                "change; leave it out"
            )
        if not fixed and self.freeze_tokens is None:
            raise ValueError(
                f"freeze_tokens=None leaves method.kind={self.method.kind} without an end; set it below train.tokens"
            )
        if isinstance(self.method, NestedConfig) and self.keep not in self.method.keeps:
            raise ValueError(f"keep={self.keep} is not in method.keeps={list(self.method.keeps)}; add it")
        return self

    @model_validator(mode="after")
    def _kinds_do_not_overlap(self) -> UnitGatesConfig:
        if len(set(self.over)) != len(self.over):
            raise ValueError(f"over={list(self.over)} names a kind twice")
        if "blocks" in self.over and len(self.over) > 1:
            raise ValueError(
                f"over={list(self.over)}: a block holds the other units and its cost theirs; gate it alone"
            )
        if {"experts", "channels"} <= set(self.over):
            raise ValueError(
                f"over={list(self.over)}: an expert holds channels and its cost theirs; choose one of them"
            )
        return self

    def build(self, config: ModelConfig, block: Block) -> UnitGates:
        """Gates for a model.

        Args:
            config: of the model.
            block: one of its blocks with all experts, also on `meta`; costs are counted in it.

        Raises:
            ValueError: the model has no such units, or the budget is out of reach.
        """
        self._fits(config)
        units = Units(groups_of(config, block, self.over), config.num_layers)
        units.counts(self.keep)
        return self.method.build(units, self.keep, self.freeze_tokens, config.width)

    def _fits_experts(self, moe: MoEConfig) -> None:
        over, router = list(self.over), moe.router
        if moe.sizes and ({"experts", "channels"} & set(over)):
            raise ValueError(f"units.over={over} does not fit ffn.sizes: uneven experts are bundles that cannot be cut")
        if "blocks" in over and moe.reads_previous_block:
            raise ValueError(
                f"units.over={over} does not fit ffn.router.reads=previous_block: without a block the next one's "
                "router would read another"
            )
        if moe.capabilities.double_forward:
            raise ValueError(
                f"units.over={over} does not fit ffn.router.kind={router.kind}, whose two passes a step would draw two "
                "masks"
            )
        if "experts" not in over:
            return
        if not moe.capabilities.selection_bias:
            raise ValueError(
                f"units.over={over} closes experts in a router's logits, which ffn.router.kind={router.kind} does not "
                "know; use a top-k router"
            )
        if getattr(router, "groups", None) is not None or getattr(router, "quantile", None) is not None:
            raise ValueError(
                f"units.over={over} does not fit ffn.router.groups or ffn.router.quantile, which count on all experts"
            )

    def _fits(self, config: ModelConfig) -> None:
        over, method, gate, moe = list(self.over), self.method, config.attention.gate, config.ffn.kind == "moe"
        if "experts" in over and not moe:
            raise ValueError(f"units.over={over} needs experts, but ffn.kind={config.ffn.kind}")
        if "channels" in over and config.ffn.activation == "poly_norm":
            raise ValueError(
                f"units.over={over} does not fit ffn.activation=poly_norm, which normalises over all channels, dropped "
                "ones too"
            )
        if config.ffn.kind == "moe":
            self._fits_experts(config.ffn)
        if "heads" in over and gate.kind != "none" and gate.heads == "shared":
            raise ValueError(
                f"units.over={over} does not fit attention.gate.heads=shared, whose gate is a mean over all heads; "
                "use heads=specific"
            )
        if isinstance(method, PolarizationConfig) and "channels" in over and moe:
            raise ValueError(
                f"units.over={over} does not fit units.method.kind=polarization with ffn.kind=moe: a gate for every "
                "token, expert and channel outgrows the activations; gate experts"
            )
        if isinstance(method, DynamicSparseConfig) and "experts" in over and method.growth == "gradient":
            raise ValueError(
                f"units.over={over} does not fit units.method.growth=gradient: a dropped expert gets no rows and no "
                "gradient; use growth=random"
            )
