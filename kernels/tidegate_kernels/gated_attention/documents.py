"""Which tokens are in one document: attention stays inside.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import torch

__all__ = ["Documents"]


class Documents:
    """Documents of a batch, each a run of equal ids.

    Args:
        ids_BT: (B, T) integers.
    """

    def __init__(self, ids_BT: torch.Tensor) -> None:
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        begins_BT = ids_BT != ids_BT.roll(1, dims=1)
        begins_BT[:, 0] = True
        ends_BT = begins_BT.roll(-1, dims=1)
        self.first_BT = torch.where(begins_BT, place_T, 0).cummax(dim=1).values.int()
        """(B, T) int32, the first token of each token's document."""
        self.end_BT = torch.where(ends_BT, place_T + 1, len(place_T)).flip(1).cummin(dim=1).values.flip(1).int()
        """(B, T) int32, the last token of each token's document, + 1."""
        self._mask: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """(B, 1, T, T) bool, True where query t may see key s: s <= t of the same document. Made once, if asked for."""
        if self._mask is None:
            place_T = torch.arange(self.first_BT.shape[1], device=self.first_BT.device)
            self._mask = (place_T >= self.first_BT[:, None, :, None]) & (place_T <= place_T[:, None])
        return self._mask
