"""Routers built as the decoder builds them, batches for them, and their decisions spread over all experts.

Letters: B sequences, T tokens, N rows, D width, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tidegate.model.clock import Clock
from tidegate.model.routers import RoutedStep, Router, RouterContext, RouterShape, Routing


@pytest.fixture
def build(initialise: Callable[..., nn.Module]) -> Callable[..., Router]:
    """`build(config, num_experts, top_k)`: an initialised router of width 24."""

    def make(config: Any, num_experts: int = 7, top_k: int = 3, **shape: Any) -> Router:
        seed = shape.pop("seed", 0)
        router = config.build(RouterShape(**{"width": 24, "std": 0.3} | shape, num_experts=num_experts, top_k=top_k))
        initialise(router, seed)
        return router

    return make


@pytest.fixture
def context() -> Callable[..., RouterContext]:
    """`context(B, T)`: a training step's batch, every token counted; keywords replace fields of it and of its clock."""

    def make(sequences: int, length: int, **changes: Any) -> RouterContext:
        clock = Clock(*(changes.pop(name, default) for name, default in (("step", 1), ("tokens", 1), ("seed", 0))))
        alone = RouterContext.alone(torch.ones(sequences, length, dtype=torch.bool))
        return alone._replace(clock=clock, **changes)

    return make


@pytest.fixture
def by_expert() -> Callable[[Routing], tuple[torch.Tensor, torch.Tensor]]:
    """`Routing` to (N, E) weights, zero where not chosen, and (N, E) bool chosen."""

    def spread(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        used = torch.ones_like(routing.experts_NS, dtype=torch.bool) if routing.chosen_NS is None else routing.chosen_NS
        chosen = torch.zeros_like(routing.probs_NE, dtype=torch.bool).scatter(1, routing.experts_NS, used)
        weights = torch.zeros_like(routing.probs_NE).scatter(1, routing.experts_NS, routing.weights_NS * used)
        return weights, chosen

    return spread


@pytest.fixture
def routed(by_expert: Callable[..., Any]) -> Callable[..., RoutedStep]:
    """`routed(routing, ...)`: what an optimizer step of these micro-batches tells `Router.update`."""

    def pool(*routings: Routing) -> RoutedStep:
        chosen = torch.cat([by_expert(routing)[1] for routing in routings])
        observed = None
        if routings[0].observed is not None:
            observed = torch.stack([routing.observed for routing in routings if routing.observed is not None]).sum(0)
        return RoutedStep(chosen.sum(0).float(), torch.tensor(float(len(chosen))), observed, Clock(1, 1, 0))

    return pool
