"""The oracle gap: how far a learned router is from the best choice of experts, found by trying them all.

With one expert a token and few layers, all E^L paths (an expert for each layer) can be run. The oracle gives every
token the path that scores its label best among those whose cost is within a budget; the router's own choices are among
them.
Source: Duo-LLM (arXiv 2410.10846), where trained routers come out near a random choice and far from the oracle.

A path is forced by selection biases: the router still weighs the expert that it is made to choose.

Letters: B sequences, T tokens, E experts, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tidegate.model.balance import relative_costs
from tidegate.model.decoder import DecoderOutput
from tidegate.model.moe import MoEConfig
from tidegate.model.routers.top_k import TopKRouter

__all__ = ["LARGEST_ENUMERATION", "OracleLosses", "oracle_losses"]

LARGEST_ENUMERATION = 6561
"""Most paths that are tried: three experts in eight layers."""

_FAR = 1e6  # a selection bias that no score comes near


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
def oracle_losses(
    forward: Callable[[], DecoderOutput],
    counted_BT: torch.Tensor,
    moe: MoEConfig,
    routers: Sequence[TopKRouter],
) -> OracleLosses:
    """Try every path on one batch.

    Args:
        forward: runs the model in evaluation mode on the batch.
        counted_BT: (B, T) bool, the tokens that count.
        moe: the experts, with top_k 1.
        routers: one a layer; E^L is at most `LARGEST_ENUMERATION`. Their biases are moved and put back.
    """
    layers = len(routers)
    assert moe.top_k == 1, moe.top_k
    assert moe.num_experts**layers <= LARGEST_ENUMERATION, (moe.num_experts, layers)
    tokens, costs = counted_BT.sum(), relative_costs(moe)

    def along(path: Sequence[int]) -> torch.Tensor:
        """(B, T) loss of every label where all tokens take one path."""
        for router, expert in zip(routers, path, strict=True):
            router.expert_bias.zero_()
            router.expert_bias[expert] = _FAR
        return _nll(forward())

    def mean(nll_BT: torch.Tensor) -> float:
        return float((nll_BT * counted_BT).sum() / tokens)

    learned = forward()
    assert learned.stats is not None
    counts_E = learned.stats.counts_BE.sum(dim=(0, 1))
    spent = float((counts_E * counts_E.new_tensor(costs)).sum() / counts_E.sum())
    budget = max(spent, min(costs))
    best_BT, random = _nll(learned), []
    before = [router.expert_bias.clone() for router in routers]
    try:
        for path in itertools.product(range(moe.num_experts), repeat=layers):
            if sum(costs[expert] for expert in path) / layers <= budget + 1e-6:
                nll_BT = along(path)
                best_BT = torch.minimum(best_BT, nll_BT)
                random.append(mean(nll_BT))
        widest = mean(along([costs.index(max(costs))] * layers))
    finally:
        for router, bias_E in zip(routers, before, strict=True):
            router.expert_bias.copy_(bias_E)
    return OracleLosses(mean(_nll(learned)), budget, mean(best_BT), sum(random) / len(random), widest)


def _nll(output: DecoderOutput) -> torch.Tensor:
    assert output.nll_BT is not None
    return output.nll_BT
