"""Quantiles from histograms, and the bias that quantile balancing sets with them.

Letters: N rows, E experts, K chosen experts, H bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.balance import max_violation
from tidegate.model.routers import SigmoidTopKConfig, SoftmaxTopKConfig
from tidegate.model.routers.quantile import histogram, quantile
from tidegate.model.routers.top_k import QuantileBalancing, SqrtSoftplusTopKConfig

SCORES = [SoftmaxTopKConfig, SigmoidTopKConfig, SqrtSoftplusTopKConfig]


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 4 / 7, 0.99, 1.0])
@pytest.mark.parametrize("rows", [1, 63, 1000])
def test_a_quantile_is_exact_to_a_bin(rows: int, q: float) -> None:
    values = torch.randn(rows, 5).clamp(-2, 2)
    counts = histogram(values, torch.ones(rows, dtype=torch.bool), 256, low=-2.0, high=2.0)
    found = quantile(counts, q, low=-2.0, high=2.0)
    width = 4 / 256
    ordered = values.sort(dim=0).values
    # The share below the value found is q, up to the rows of one bin.
    below = (ordered[:, :, None] < (found - width)[:, None].T[None]).float().mean(0).diagonal()
    upto = (ordered[:, :, None] <= (found + width)[:, None].T[None]).float().mean(0).diagonal()
    assert (below <= q + 1e-6).all()
    assert (upto >= q - 1e-6).all()


def test_a_histogram_counts_counted_rows_and_clamps() -> None:
    values = torch.tensor([[-9.0, 0.1], [0.3, 0.9], [9.0, 0.5], [0.6, 0.6]])
    counts = histogram(values, torch.tensor([True, True, True, False]), 2, low=0.0, high=1.0)
    assert counts.tolist() == [[2, 1], [1, 2]]
    assert quantile(counts, 0.5, low=0.0, high=1.0).tolist() == pytest.approx([0.375, 0.625])


@pytest.mark.parametrize("make", SCORES, ids=lambda make: make.model_fields["kind"].default)
@pytest.mark.parametrize(("num_experts", "top_k", "std"), [(7, 3, 0.05), (8, 1, 0.05), (64, 8, 0.02), (256, 8, 0.02)])
def test_updates_balance_fixed_scores(
    make: Any,
    num_experts: int,
    top_k: int,
    std: float,
    build: Callable[..., Any],
    context: Callable[..., Any],
    routed: Any,
) -> None:
    """One update does the larger part, ten leave a few percent. 2,001 rows: no multiple of E / K is asked for."""
    router = build(make(quantile=QuantileBalancing()), num_experts, top_k, std=std, width=256)
    x, batch = torch.randn(2001, 256) + 0.5 * torch.randn(256), context(3, 667)
    assert 2001 * top_k % num_experts
    violations = []
    for _ in range(11):
        now = routed(router(x, batch))
        violations.append(float(max_violation(now.counts_E)))
        router.update(now)
    assert violations[1] < 0.6 * violations[0]
    assert violations[10] < 0.1
    assert abs(float(router.expert_bias.mean())) < 1e-6


def test_an_update_does_not_depend_on_the_cut(
    build: Callable[..., Any], context: Callable[..., Any], routed: Any
) -> None:
    """Histograms of whole rows add up: one rank, four micro-batches and eight ranks set the same bits."""
    x, biases = torch.randn(64, 24), []
    for rows in (64, 16, 8):
        router = build(SoftmaxTopKConfig(quantile=QuantileBalancing()))
        router.expert_bias.copy_(torch.linspace(-0.1, 0.1, 7))
        router.update(routed(*(router(part, context(1, rows)) for part in x.split(rows))))
        biases.append(router.expert_bias)
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])


def test_the_bias_by_hand(build: Callable[..., Any], context: Callable[..., Any], routed: Any) -> None:
    """Minus the (1 - K/E) quantile of score minus the row's (K+1)-th biased score, centred; then the moving average."""
    router = build(SigmoidTopKConfig(quantile=QuantileBalancing(bins=4096, ema=0.25)))
    start = 0.05 * torch.randn(7)
    router.expert_bias.copy_(start - start.mean())
    x = torch.randn(2000, 24)
    scores = (x @ router.weight.detach().T).sigmoid()
    threshold = (scores + router.expert_bias).sort(dim=1, descending=True).values[:, 3:4]
    target = -(scores - threshold).quantile(1 - 3 / 7, dim=0)
    expected = 0.25 * router.expert_bias + 0.75 * (target - target.mean())
    router.update(routed(router(x, context(2, 1000))))
    torch.testing.assert_close(router.expert_bias, expected, rtol=0, atol=2e-3)


def test_uncounted_rows_and_evaluation_do_not_take_part(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router, x = build(SoftmaxTopKConfig(quantile=QuantileBalancing())), torch.randn(63, 24)
    counted = torch.rand(7, 9) < 0.5
    observed = router(x, context(7, 9, counted_BT=counted)).observed
    assert (observed.sum(1) == counted.sum()).all()
    elsewhere = torch.where(counted.view(-1, 1), x, torch.randn(63, 24))
    assert torch.equal(router(elsewhere, context(7, 9, counted_BT=counted)).observed, observed)
    assert router.eval()(x, context(7, 9)).observed is None
