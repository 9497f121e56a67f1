"""Two layers of a mixer that learn associative recall.

Letters: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tidegate.data.recall import recall_batch


class Recaller(nn.Module):
    """Two layers of a mixer alone, and the embedding as the head."""

    def __init__(self, layer: Callable[[int], nn.Module], vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.layers = nn.ModuleList(layer(number) for number in range(2))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        h_BTD = self.embedding(tokens_BT)
        for norm, layer in zip(self.norms[:2], self.layers, strict=True):
            h_BTD = h_BTD + layer(norm(h_BTD)).y_BTD
        return F.linear(self.norms[2](h_BTD), self.embedding.weight)


def _learned_recall(layer: Callable[[int], nn.Module], steps: int, enough: float = 0.99) -> float:
    """Best accuracy on fixed sequences, at the settings at which attention and linear mixers were calibrated."""
    torch.manual_seed(0)
    model = Recaller(layer, 128, 64)
    nn.init.normal_(model.embedding.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    test, best = recall_batch(512, 48, 6, 128, torch.Generator().manual_seed(99)), 0.0
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, step / 100)
        tokens, labels, counted = recall_batch(64, 48, 6, 128, generator)
        F.cross_entropy(model(tokens)[counted], labels[counted]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            with torch.no_grad():
                said = model(test.tokens_BT)[test.counted_BT].argmax(dim=-1)
            best = max(best, float((said == test.labels_BT[test.counted_BT]).float().mean()))
            if best >= enough:
                break
    return best


@pytest.fixture
def learned_recall() -> Callable[..., float]:
    """`(layer, steps, enough) -> accuracy`, with `layer(number)` of width 64 that returns something with `y_BTD`."""
    return _learned_recall
