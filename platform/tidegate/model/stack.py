"""The blocks of a model by their token mixers: which block has which, and what one reads of another."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tidegate.config import Config
from tidegate.model.mixers import (
    CrossAttentionConfig,
    DynamicMaskConfig,
    GMUConfig,
    LinearMixerConfig,
    MixerConfig,
    SlidingWindowConfig,
)
from tidegate.model.schedule import ATTENTION, repeated

__all__ = ["StackConfig"]


class StackConfig(Config):
    num_layers: int = Field(ge=1)
    mixers: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]+$")], MixerConfig] = Field(default_factory=dict)
    """Other token mixers, by a name of the job's own, for `layers`."""
    layers: str | None = None
    """Which block has which mixer, e.g. `[3 x kda, 1 x attention] x 6`; a pattern repeats up to `num_layers`. None: all
    attend."""

    @property
    def schedule(self) -> tuple[str, ...]:
        """The name of each block's token mixer."""
        return (ATTENTION,) * self.num_layers if self.layers is None else repeated(self.layers, self.num_layers)

    @property
    def windows(self) -> dict[int, int | None]:
        """Of the blocks that attend, how many tokens a token sees; None for all."""
        found: dict[int, int | None] = {}
        for block, name in enumerate(self.schedule):
            mixer = self.mixers.get(name)
            if mixer is None or isinstance(mixer, CrossAttentionConfig):
                found[block] = None
            elif isinstance(mixer, SlidingWindowConfig):
                found[block] = mixer.window
            elif isinstance(mixer, DynamicMaskConfig):
                found[block] = mixer.keep
        return found

    def publisher(self, block: int) -> int | None:
        """The nearest block before this one that it reads: a GMU the memory of a linear mixer, cross attention the keys
        and values of `model.attention`; None: there is none."""
        names = self.schedule[:block]
        if block in self.cross_attention:
            return max((i for i, name in enumerate(names) if name == ATTENTION), default=None)
        linear = (i for i, name in enumerate(names) if isinstance(self.mixers.get(name), LinearMixerConfig))
        return max(linear, default=None)

    @property
    def cross_attention(self) -> frozenset[int]:
        """The blocks that attend without keys and values of their own."""
        return self._of(CrossAttentionConfig)

    def _of(self, *kinds: type[MixerConfig]) -> frozenset[int]:
        return frozenset(i for i, name in enumerate(self.schedule) if isinstance(self.mixers.get(name), kinds))

    def memory_channels(self, block: int) -> int:
        """C of what a block with a linear mixer publishes."""
        mixer = self.mixers[self.schedule[block]]
        assert isinstance(mixer, LinearMixerConfig)
        return mixer.num_heads * mixer.value_dim

    @property
    def publishing(self) -> frozenset[int]:
        """The blocks whose memory, or keys and values, others read."""
        readers = self._of(GMUConfig, CrossAttentionConfig)
        return frozenset(source for reader in readers if (source := self.publisher(reader)) is not None)

    @model_validator(mode="after")
    def _layers_are_there(self) -> StackConfig:
        used, known = dict.fromkeys(self.schedule), [ATTENTION, *self.mixers]
        if ATTENTION in self.mixers:
            raise ValueError(f"mixers.{ATTENTION}: that name is model.attention's; use another")
        if unknown := [name for name in used if name not in known]:
            raise ValueError(f"layers={self.layers!r}: there is no mixer {unknown[0]!r}; there are: {', '.join(known)}")
        if unused := [name for name in self.mixers if name not in used]:
            raise ValueError(f"mixers.{unused[0]} is in no layer (layers={self.layers!r}); use it there, or remove it")
        for block, name in enumerate(self.schedule):
            if isinstance(self.mixers.get(name), GMUConfig) and self.publisher(block) is None:
                raise ValueError(
                    f"layers={self.layers!r}: block {block} is {name!r}, a Gated Memory Unit, and no block before it "
                    "has a linear mixer whose memory it could read"
                )
            if block in self.cross_attention and self.publisher(block) is None:
                raise ValueError(
                    f"layers={self.layers!r}: block {block} is {name!r}, cross attention, and no block before it is "
                    f"{ATTENTION!r}, whose keys and values it could read"
                )
        return self
