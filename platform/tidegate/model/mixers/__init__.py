"""Token mixers beside full attention.

Linear ones have one contract: inputs, documents and a state in, outputs and a state out; a GAM keeps it without a
memory. Attention with a window is `Attention` (`model/attention.py`), that with a dynamic mask derives from it. A GMU
reads what a linear one publishes, cross attention the keys and values of full attention.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate.model.mixers.cross_attention import CrossAttention, CrossAttentionConfig
from tidegate.model.mixers.dynamic_mask import DynamicMaskAttention, DynamicMaskConfig
from tidegate.model.mixers.gam import GAM, GAMConfig
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
    "GAM",
    "GMU",
    "CrossAttention",
    "CrossAttentionConfig",
    "DynamicMaskAttention",
    "DynamicMaskConfig",
    "GAMConfig",
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

MixerConfig = Annotated[
    LinearMixerConfig | GAMConfig | SlidingWindowConfig | DynamicMaskConfig | GMUConfig | CrossAttentionConfig,
    Field(discriminator="kind"),
]
