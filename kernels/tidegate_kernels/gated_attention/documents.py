"""Which earlier tokens a token sees: those of its document, or the nearest of them.

Letters: B batch, T tokens, S documents of the batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["Documents", "Visible", "nearest"]


class Visible:
    """A token sees a run of tokens that ends with itself.

    Args:
        first_BT: (B, T) int32, the first token that each token sees; never falls from token to token.
        end_BT: (B, T) int32, the last token that sees each token, + 1; never falls.
    """

    def __init__(self, first_BT: torch.Tensor, end_BT: torch.Tensor) -> None:
        self.first_BT, self.end_BT = first_BT, end_BT

    @property
    def mask(self) -> torch.Tensor:
        """(B, 1, T, T) bool, True where query t sees key s."""
        place_T = torch.arange(self.first_BT.shape[1], device=self.first_BT.device)
        return (place_T >= self.first_BT[:, None, :, None]) & (place_T <= place_T[:, None])


class Documents(Visible):
    """Documents of a batch, each a run of equal ids; a token sees its own.

    Args:
        ids_BT: (B, T) integers.
    """

    def __init__(self, ids_BT: torch.Tensor) -> None:
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        begins_BT = ids_BT != ids_BT.roll(1, dims=1)
        begins_BT[:, 0] = True
        ends_BT = begins_BT.roll(-1, dims=1)
        first_BT = torch.where(begins_BT, place_T, 0).cummax(dim=1).values.int()
        end_BT = torch.where(ends_BT, place_T + 1, len(place_T)).flip(1).cummin(dim=1).values.flip(1).int()
        super().__init__(first_BT, end_BT)
        self._mask: torch.Tensor | None = None
        self._begins: torch.Tensor | None = None
        self._nearest: dict[int, Visible] = {}

    @property
    def mask(self) -> torch.Tensor:
        """(B, 1, T, T) bool, True where query t sees key s: s <= t of the same document. Made once, if asked for."""
        if self._mask is None:
            self._mask = super().mask
        return self._mask

    @property
    def begins(self) -> torch.Tensor:
        """(S + 1,) int64, where each document of the flattened batch begins, and B T; waits for the device, once."""
        if self._begins is None:
            own_BT = self.first_BT == torch.arange(self.first_BT.shape[1], device=self.first_BT.device)
            begins_S = own_BT.flatten().nonzero().squeeze(1)
            self._begins = torch.cat([begins_S, begins_S.new_tensor([own_BT.numel()])])
        return self._begins

    def nearest(self, window: int) -> Visible:
        """The last `window` tokens of the same document, a token's own among them. Made once."""
        if window not in self._nearest:
            near = nearest(*self.first_BT.shape, window, self.first_BT.device)
            first_BT, end_BT = torch.maximum(self.first_BT, near.first_BT), torch.minimum(self.end_BT, near.end_BT)
            self._nearest[window] = Visible(first_BT, end_BT)
        return self._nearest[window]


@lru_cache(maxsize=8)
def nearest(batch: int, length: int, window: int, device: torch.device) -> Visible:
    """The last `window` tokens, a token's own among them, where each sequence is one document."""
    place_BT = torch.arange(length, device=device, dtype=torch.int32).expand(batch, -1)
    first_BT, end_BT = (place_BT - (window - 1)).clamp(min=0), (place_BT + window).clamp(max=length)
    return Visible(first_BT.contiguous(), end_BT.contiguous())
