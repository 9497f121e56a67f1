"""Token mixers beside softmax attention, one contract: inputs, documents and a state in, outputs and a state out."""

from __future__ import annotations

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

__all__ = [
    "GLAConfig",
    "GatedDeltaNetConfig",
    "HGRN2Config",
    "KDAConfig",
    "LinearMixer",
    "LinearMixerConfig",
    "MixerOutput",
    "MixerState",
    "Place",
    "ScalarGatedConfig",
]
