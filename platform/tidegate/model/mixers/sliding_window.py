"""Attention that sees the nearest tokens alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tidegate.config import Variant

__all__ = ["SlidingWindowConfig"]


class SlidingWindowConfig(Variant):
    """`model.attention` with a window: the same heads, norms and gate."""

    kind: Literal["sliding_window"] = "sliding_window"
    summary: ClassVar[str] = "model.attention that sees the last tokens alone"
    source: ClassVar[str] = "Longformer, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825"
    example: ClassVar[str] = "window: 128"
    window: int = Field(ge=1)
    """Tokens, a token's own among them."""
