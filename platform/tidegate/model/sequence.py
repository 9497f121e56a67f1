"""Sequences that several ranks hold together, each a run of their tokens: what a block must ask the others for.

Everything that treats tokens one by one, experts and their balance too, does not notice. Softmax attention swaps tokens
for heads (`SequenceRanks.attend`), a linear mixer goes on from the state that the rank before hands on (`passed_on`).

Letters: B batch, T tokens of this rank, S ranks of a sequence, H heads, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tidegate.model.mixers import GAM, LinearMixer, MixerOutput, MixerState
from tidegate_kernels.gated_attention import Documents

__all__ = ["SequencePart", "SequenceRanks", "passed_on"]


class SequenceRanks(ABC):
    """The ranks that hold the same sequences.

    Attributes:
        index: of this rank, which has the tokens from T index on.
        count: S.
    """

    index: int
    count: int

    @abstractmethod
    def attend(
        self,
        attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        q_BTHd: torch.Tensor,
        k_BTGd: torch.Tensor,
        v_BTGd: torch.Tensor,
    ) -> torch.Tensor:
        """Attention over all tokens by H / S heads on each rank: rank i has the heads from i H / S on."""

    @abstractmethod
    def receive(self, like: Sequence[torch.Tensor], anchor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the rank before sends; its gradients go back there. Not for the first rank.

        Args:
            like: shapes and dtypes.
            anchor: a tensor that carries gradient if there are any.
        """

    @abstractmethod
    def send(self, y: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Send to the rank after, if there is one; returns `y`, whose gradient brings theirs from there."""

    def own(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """This rank's part of an axis, of tokens or of heads."""
        return x.tensor_split(self.count, dim=axis)[self.index]


class SequencePart(NamedTuple):
    """What a forward pass knows of the sequences that its tokens are a part of."""

    ranks: SequenceRanks
    length: int
    """Of the sequences, S T."""
    documents: Documents | None
    """Of the whole sequences."""

    @property
    def begins(self) -> int:
        """Place of this rank's first token."""
        return self.ranks.index * self.length // self.ranks.count

    def goes_on_B(self) -> torch.Tensor | None:
        """(B,) bool, whether the first token's document began on a rank before; None: all do."""
        return None if self.documents is None else self.documents.first_BT[:, self.begins] < self.begins


def passed_on(
    mixer: LinearMixer | GAM, x_BTD: torch.Tensor, documents: Documents | None, part: SequencePart
) -> MixerOutput:
    """A mixer's pass over this rank's tokens, from the state of the rank before; ranks take turns.

    Args:
        mixer: with a state.
        x_BTD: (B, T, D), normalised.
        documents: of this rank's tokens.
        part: of the sequences.
    """
    state: MixerState | None = None
    if part.ranks.index:
        empty = mixer.empty_state(x_BTD)
        like = [x for x in empty if x is not None]
        received = iter(part.ranks.receive(like, x_BTD))
        goes_on_B = part.goes_on_B()
        kept = []
        for x in empty:
            came = None if x is None else next(received)
            if came is not None and goes_on_B is not None:
                came = came * goes_on_B.view(-1, *[1] * (came.ndim - 1))
            kept.append(came)
        state = MixerState(*kept)
    output = mixer(x_BTD, documents, state)
    return output._replace(y_BTD=part.ranks.send(output.y_BTD, [x for x in output.state if x is not None]))
