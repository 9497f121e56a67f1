"""Token mixers beside full attention.

Linear ones have one contract: inputs, documents and a state in, outputs and a state out. Attention with a window is
`Attention` (`model/attention.py`). A GMU reads what a linear one publishes.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate.model.mixers.gmu import GMU, GMUConfig
from tidegate.model.mixers.linear import (
    GatedDeltaNetConfig,
    GLAConfig,
    HGRN2Config,
    KDAConfig,
    LinearMixer,
    LinearMixerConfig,
    MixerOutput,
    MixerState,
    Place,
    ScalarGatedConfig,
)
from tidegate.model.mixers.sliding_window import SlidingWindowConfig

__all__ = [
    "GMU",
    "GLAConfig",
    "GMUConfig",
    "GatedDeltaNetConfig",
    "HGRN2Config",
    "KDAConfig",
    "LinearMixer",
    "LinearMixerConfig",
    "MixerConfig",
    "MixerOutput",
    "MixerState",
    "Place",
    "ScalarGatedConfig",
    "SlidingWindowConfig",
]

MixerConfig = Annotated[LinearMixerConfig | SlidingWindowConfig | GMUConfig, Field(discriminator="kind")]
