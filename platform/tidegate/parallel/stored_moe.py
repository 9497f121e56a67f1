"""The mixture whose routed experts live in an `ExpertStore`: it borrows a layer's weights for a pass.

What autograd would keep of the weights for the backward pass is not kept but fetched again. Where activations are
recomputed that follows by itself: the block's second forward pass borrows again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tidegate.model.activations import ActivationName, has_coefficients
from tidegate.model.dispatch import Dispatch
from tidegate.model.initialisation import Draw
from tidegate.model.moe import Experts
from tidegate.parallel.expert import SpreadMoE, join_expert_groups, replica_group
from tidegate.parallel.expert_store import ExpertStore, Piece, same_memory

__all__ = ["StoredExperts", "StoredMoE"]


class _Place(NamedTuple):
    """Where a tensor lies in a layer's flat weights, in place of the tensor."""

    start: int
    shape: torch.Size
    stride: tuple[int, ...]


class StoredExperts(Experts):
    """`Experts` that have their weights only inside of `lent`.

    Args:
        num, width, expert_dim, std, out_std, first, activation: as for `Experts`.
        store: holds the weights.
    """

    def __init__(
        self,
        num: int,
        width: int,
        expert_dim: int,
        std: float,
        out_std: float,
        first: int,
        activation: ActivationName,
        store: ExpertStore,
    ) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.first, self.activation = num, first, activation
        self._arguments = num, width, expert_dim, std, out_std, first, activation
        self._store = store
        with torch.device("meta"):
            named = dict(Experts(*self._arguments).named_parameters())
        decayed = {name: name != "w3" or not has_coefficients(activation) for name in named}
        self._layer = store.add({name: Piece(tuple(w.shape), decayed[name]) for name, w in named.items()})
        self._weights: dict[str, torch.Tensor] | None = None

    def init_weights(self, draw: Draw) -> None:
        """The values that `Experts` would have on the device."""
        with torch.device("meta"):
            drawn = Experts(*self._arguments)
        drawn.to_empty(device=self._store.device).init_weights(draw)
        self._store.fill(self._layer, dict(drawn.named_parameters()))

    def __getattr__(self, name: str) -> Any:
        if name in ("w1", "w2", "w3"):  # not before they are needed: rows may have to travel first
            if self._weights is None:
                self._weights = self._store.lend(self._layer)
            return self._weights[name]
        return super().__getattr__(name)

    @contextmanager
    def lent(self, *, keeps: bool) -> Iterator[None]:
        """Weights are there inside.

        Args:
            keeps: whether autograd keeps what it needs for the backward pass of what is done inside.
        """
        self._weights = None
        try:
            with saved_tensors_hooks(self._pack, self._unpack) if keeps else nullcontext():
                yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._weights is not None:
            self._store.release(self._layer)
        self._weights = None

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        if not self._store.lies_here(tensor):
            return tensor
        start = int(tensor.storage_offset() - self._store.flat(self._layer).storage_offset())
        return _Place(start, tensor.shape, tensor.stride())

    def _unpack(self, kept: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        return same_memory(self._store.flat(self._layer), *kept)


class StoredMoE(SpreadMoE):
    """`MoE` whose routed experts are spread over ranks and live on their hosts.

    Args:
        arguments: of `SpreadMoE`.
        store: of the rank.
        recompute: whether blocks run again in the backward pass of training.
        keywords: of `SpreadMoE`.
    """

    experts: StoredExperts

    def __init__(self, *arguments: Any, store: ExpertStore, recompute: bool, **keywords: Any) -> None:
        self._of_store = store, recompute
        super().__init__(*arguments, **keywords)

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        (num_local, expert_rank), config = self._local, self.config
        first, store = num_local * expert_rank, self._of_store[0]
        return StoredExperts(num_local, width, config.expert_dim, std, out_std, first, config.activation, store)

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """The engine asks every module that has this method."""
        join_expert_groups(self)
        self._of_store[0].group = replica_group(self)

    def mix(self, x_ND: torch.Tensor, dispatch: Dispatch, channels_EF: torch.Tensor | None) -> torch.Tensor:
        with self.experts.lent(keeps=not (self._of_store[1] and self.training)):
            return super().mix(x_ND, dispatch, channels_EF)
