"""Linear attention with decays, by addition or by the delta rule: the two recurrences of gated linear token mixers.

Letters: B batch, T tokens, H heads, K key width, V value width, k decays a head (K or 1).
"""

from __future__ import annotations

from tidegate_kernels.linear_attention.chunked import linear_attention
from tidegate_kernels.linear_attention.reference import LinearOutput

__all__ = ["LinearOutput", "linear_attention"]
