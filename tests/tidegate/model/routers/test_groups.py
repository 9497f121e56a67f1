"""Group-limited selection against brute force.

Letters: N rows, E experts, K chosen experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.config import ConfigError
from tidegate.model.moe import MoEConfig
from tidegate.model.routers import SigmoidTopKConfig, SoftmaxTopKConfig
from tidegate.model.routers.top_k import GroupsConfig, QuantileBalancing, SqrtSoftplusTopKConfig
from tidegate_kernels.router_topk import SCORES as FUNCTIONS

SCORES = [SoftmaxTopKConfig, SigmoidTopKConfig, SqrtSoftplusTopKConfig]
every_score = pytest.mark.parametrize("make", SCORES, ids=lambda make: make.model_fields["kind"].default)


def limited_by_hand(biased_E: list[float], num: int, keep: int, top_k: int) -> set[int]:
    size = len(biased_E) // num
    groups = [range(g * size, (g + 1) * size) for g in range(num)]
    by_best_two = sorted(groups, key=lambda group: -sum(sorted((biased_E[e] for e in group), reverse=True)[:2]))
    open_experts = [e for group in by_best_two[:keep] for e in group]
    return set(sorted(open_experts, key=lambda e: -biased_E[e])[:top_k])


@every_score
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num", "keep"), [(12, 3, 4, 2), (12, 4, 4, 2), (9, 3, 3, 1), (6, 3, 6, 3), (33, 5, 11, 4)]
)
def test_groups_equal_brute_force(
    num_experts: int, top_k: int, num: int, keep: int, make: Any, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    router = build(make(groups=GroupsConfig(num=num, keep=keep)), num_experts, top_k)
    router.expert_bias.copy_(0.2 * torch.randn(num_experts))
    x = torch.randn(63, 24)
    routing = router(x, context(7, 9))
    biased = FUNCTIONS[router.score](x @ router.weight.detach().T) + router.expert_bias
    size = num_experts // num
    for experts, row in zip(routing.experts_NS.tolist(), biased.tolist(), strict=True):
        assert len({e // size for e in experts}) <= keep
        assert set(experts) == limited_by_hand(row, num, keep, top_k)
        assert len(set(experts)) == top_k
    if size == 1:
        return  # K experts lie in K groups anyway
    free = build(make(), num_experts, top_k)
    free.expert_bias.copy_(router.expert_bias)
    assert not torch.equal(free(x, context(7, 9)).experts_NS, routing.experts_NS), "the limit binds"


@every_score
def test_all_groups_are_no_limit(make: Any, build: Callable[..., Any], context: Callable[..., Any]) -> None:
    limited, free = (build(make(groups=g), 12, 3) for g in (GroupsConfig(num=4, keep=4), None))
    x = torch.randn(63, 24)
    for one, other in zip(limited(x, context(7, 9))[:4], free(x, context(7, 9))[:4], strict=True):
        assert torch.equal(one, other)


def test_groups_and_quantile_balancing_are_refused_together() -> None:
    """The quantile's threshold is that of a free choice: with groups, loads settle 10 to 30 % apart, not 2 %."""
    router = SoftmaxTopKConfig(groups=GroupsConfig(num=4, keep=2), quantile=QuantileBalancing())
    with pytest.raises(ValueError, match=r"router\.quantile balances a free choice .* balance\.bias_rate"):
        MoEConfig(num_experts=12, top_k=3, expert_dim=8, router=router)


@pytest.mark.parametrize(
    ("num", "keep", "top_k", "message"),
    [
        (5, 1, 1, r"router\.groups\.num=5 does not divide num_experts=12"),
        (4, 5, 1, r"router\.groups\.keep=5 is more than router\.groups\.num=4"),
        (4, 1, 4, r"router\.groups\.keep=1 groups hold 3 experts, fewer than top_k=4"),
    ],
)
def test_groups_that_cannot_be_cut_are_refused(num: int, keep: int, top_k: int, message: str) -> None:
    router = SoftmaxTopKConfig(groups=GroupsConfig(num=num, keep=keep))
    with pytest.raises((ValueError, ConfigError), match=message):
        MoEConfig(num_experts=12, top_k=top_k, expert_dim=8, router=router)
