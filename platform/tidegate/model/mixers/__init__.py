"""Token mixers beside full attention.

Linear ones have one contract: inputs, documents and a state in, outputs and a state out. Attention with a window is
`Attention` (`model/attention.py`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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
    "GLAConfig",
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

MixerConfig = Annotated[LinearMixerConfig | SlidingWindowConfig, Field(discriminator="kind")]
