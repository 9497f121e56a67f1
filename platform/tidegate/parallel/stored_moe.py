"""The mixture whose routed experts live in an `ExpertStore`: it borrows a layer's weights for a pass.

What autograd would keep of the weights for the backward pass is not kept but fetched again. Where activations are
recomputed that follows by itself: the block's second forward pass borrows again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tidegate.model.activations import ActivationName, has_coefficients
from tidegate.model.decoder import Decoder
from tidegate.model.dispatch import Dispatch
from tidegate.model.initialisation import Draw
from tidegate.model.moe import Experts, Meanwhile, RoutingStats, nothing
from tidegate.model.routers import RouterContext, Routing
from tidegate.model.unit_gates.units import NO_MASKS, LayerMasks
from tidegate.parallel.collectives import HostCopy
from tidegate.parallel.expert import SpreadMoE, join_expert_groups, replica_group
from tidegate.parallel.expert_layout import Piece
from tidegate.parallel.expert_store import ExpertStore, in_backward, same_memory

__all__ = ["StoredExperts", "StoredMoE", "announce_early_routers"]


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
        self.layer = store.add({name: Piece(tuple(w.shape), decayed[name]) for name, w in named.items()})
        self._weights: dict[str, torch.Tensor] | None = None

    def init_weights(self, draw: Draw) -> None:
        """The values that `Experts` would have on the device."""
        with torch.device("meta"):
            drawn = Experts(*self._arguments)
        drawn.to_empty(device=self._store.device).init_weights(draw)
        self._store.fill(self.layer, dict(drawn.named_parameters()))

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As `Experts.fill`, in the store."""
        self._store.fill(self.layer, tensors)

    def __getattr__(self, name: str) -> Any:
        if name in ("w1", "w2", "w3"):  # not before they are needed: rows may have to travel first
            if self._weights is None:
                self._weights = self._store.lend(self.layer)
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
            self._store.release(self.layer)
        self._weights = None

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        if not self._store.lies_here(tensor):
            return tensor
        start = int(tensor.storage_offset() - self._store.flat(self.layer).storage_offset())
        return _Place(start, tensor.shape, tensor.stride())

    def _unpack(self, kept: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        return same_memory(self._store.flat(self.layer), *kept)


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
        self._following: tuple[StoredMoE, ...] = ()
        self._chosen_E: torch.Tensor | None = None
        """(E,) bool, what the layer before announced."""
        super().__init__(*arguments, **keywords)

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        (num_local, expert_rank), config = self._local, self.config
        first, store = num_local * expert_rank, self._of_store[0]
        return StoredExperts(num_local, width, config.expert_dim, std, out_std, first, config.activation, store)

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """The engine asks every module that has this method."""
        join_expert_groups(self)
        self._of_store[0].group = replica_group(self)

    def decides_for(self, following: StoredMoE) -> None:
        """The router of the following layer reads what this one does: its experts are known a block early.

        With experts on other ranks, whose rows are not known here, and with uneven ones all are fetched nevertheless.
        """
        if self.ep_size == 1 and not self.config.sizes:
            self._following = (following,)  # not a submodule
            self._of_store[0].announces(following.experts.layer)

    def forward(
        self,
        x_BTD: torch.Tensor,
        context: RouterContext,
        routing: Routing | None = None,
        masks: LayerMasks = NO_MASKS,
    ) -> tuple[torch.Tensor, RoutingStats]:
        """As `MoE`'s; then fetch for the following layer what it will need, while the device is busy with this one."""
        following, chosen = (self._following or (None,))[0], None
        if following is not None and not in_backward():
            with torch.no_grad():
                early = following.route(x_BTD, context)
            chosen_E = used_experts(early.experts_NS, self.num_experts, early.chosen_NS)
            following._chosen_E, chosen = chosen_E, HostCopy(chosen_E)
        result = super().forward(x_BTD, context, routing, masks)
        if following is not None and chosen is not None:
            self._of_store[0].choose(following.experts.layer, chosen.tensor())
        return result

    def mix(
        self, x_ND: torch.Tensor, dispatch: Dispatch, channels_EF: torch.Tensor | None, meanwhile: Meanwhile = nothing
    ) -> torch.Tensor:
        if self._chosen_E is not None:
            self._of_store[0].check(used_experts(dispatch.slice_A, self.num_experts), self._chosen_E)
        with self.experts.lent(keeps=not (self._of_store[1] and self.training)):
            return super().mix(x_ND, dispatch, channels_EF, meanwhile)


def used_experts(experts: torch.Tensor, num_experts: int, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """(E,) bool, which numbers occur in `experts`, of any shape; only where `chosen` if it is given."""
    used = torch.ones_like(experts, dtype=torch.bool) if chosen is None else chosen
    found_E = torch.zeros(num_experts, dtype=torch.int32, device=experts.device)
    return found_E.scatter_add_(0, experts.flatten(), used.flatten().int()) > 0


def announce_early_routers(model: Decoder) -> None:
    """Let layers fetch only chosen experts of the next one, where its router reads the block before."""
    layers = [module for module in model.modules() if isinstance(module, StoredMoE)]
    for layer, following in pairwise(layers):
        if layer.config.reads_previous_block:
            layer.decides_for(following)
