"""The oracle gap: how far a learned router is from the best choice of experts, found by trying them all.

With one expert a token and few layers, all E^L paths (an expert for each layer) can be run. The oracle gives every
token the path that scores its label best among those whose cost is within a budget; the router's own choices are among
them.
Source: Duo-LLM (arXiv 2410.10846), where trained routers come out near a random choice and far from the oracle.

Letters: B sequences, T tokens, E experts, L layers, N = B T rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tidegate.model.balance import relative_costs
from tidegate.model.decoder import DecoderOutput
from tidegate.model.moe import MoEConfig
from tidegate.model.routers import Routing

__all__ = ["LARGEST_ENUMERATION", "OracleLosses", "oracle_losses"]

LARGEST_ENUMERATION = 6561
"""Most paths that are tried: three experts in eight layers."""

Forward = Callable[[list[Routing] | None], DecoderOutput]
"""Score the batch by these decisions for each layer; None leaves them to the router."""


class OracleLosses(NamedTuple):
    """Nats a counted token."""

    learned: float
    """By the router."""
    budget: float
    """Relative cost of a token that the oracle may spend: what the router spent, or more where no path is as cheap."""
    oracle: float
    """By the best path of each token within the budget, or the router's choice; at most `learned`."""
    random: float
    """Mean over the paths within the budget."""
    widest: float
    """By the widest expert in every layer."""

    def metrics(self) -> dict[str, float]:
        named = {f"oracle/{name}": value for name, value in self._asdict().items()}
        return named | {"oracle/gap": self.learned - self.oracle}


@torch.no_grad()
def oracle_losses(forward: Forward, counted_BT: torch.Tensor, moe: MoEConfig, num_layers: int) -> OracleLosses:
    """Try every path on one batch.

    Args:
        forward: runs the model in evaluation mode on the batch.
        counted_BT: (B, T) bool, the tokens that count.
        moe: the experts, with top_k 1.
        num_layers: L; E^L is at most `LARGEST_ENUMERATION`.
    """
    assert moe.top_k == 1, moe.top_k
    assert moe.num_experts**num_layers <= LARGEST_ENUMERATION, (moe.num_experts, num_layers)
    costs = relative_costs(moe)
    learned = forward(None)
    assert learned.stats is not None
    assert learned.nll_BT is not None
    counts_E = learned.stats.counts_BE.sum(dim=(0, 1))
    spent = float((counts_E * counts_E.new_tensor(costs)).sum() / counts_E.sum())
    budget = max(spent, min(costs))
    best_BT, total, paths = learned.nll_BT, 0.0, 0
    tokens = counted_BT.sum()
    for path in itertools.product(range(moe.num_experts), repeat=num_layers):
        if sum(costs[expert] for expert in path) / num_layers > budget + 1e-6:
            continue
        nll_BT = _along(forward, path, counted_BT, moe)
        best_BT = torch.minimum(best_BT, nll_BT)
        total, paths = total + float((nll_BT * counted_BT).sum() / tokens), paths + 1
    widest = _along(forward, (costs.index(max(costs)),) * num_layers, counted_BT, moe)
    mean = (float((nll_BT * counted_BT).sum() / tokens) for nll_BT in (learned.nll_BT, best_BT, widest))
    learned_loss, oracle_loss, widest_loss = mean
    return OracleLosses(learned_loss, budget, oracle_loss, total / paths, widest_loss)


def _along(forward: Forward, path: tuple[int, ...], counted_BT: torch.Tensor, moe: MoEConfig) -> torch.Tensor:
    """(B, T) loss of every label where all tokens take one path."""
    nll_BT = forward(list(_decisions(path, counted_BT, moe))).nll_BT
    assert nll_BT is not None
    return nll_BT


def _decisions(path: tuple[int, ...], counted_BT: torch.Tensor, moe: MoEConfig) -> Iterator[Routing]:
    """A routing for each layer that sends all rows to one expert with weight 1."""
    rows, device = counted_BT.numel(), counted_BT.device
    for expert in path:
        experts_N1 = torch.full((rows, 1), expert, device=device)
        probs_NE = torch.nn.functional.one_hot(experts_N1.squeeze(1), moe.num_experts).float()
        yield Routing(experts_N1, torch.ones(rows, 1, device=device), probs_NE, torch.zeros_like(probs_NE))
