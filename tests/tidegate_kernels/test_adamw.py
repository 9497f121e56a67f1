"""adamw against torch.optim.AdamW in fp64.

Letters: N weights.
"""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.adamw import Rates, StepFactors, adamw, step_factors

RATES = Rates(learning_rate=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def factors(step: int, scale: float = 1.0, *, skip: bool = False) -> StepFactors:
    return step_factors(torch.tensor(float(step)), RATES.betas, torch.tensor(scale), torch.tensor(float(skip)))


def fresh(N: int) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(N)
    return weights, weights.bfloat16(), torch.zeros(N), torch.zeros(N)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("N", [1, 63, 1000, 5000])
def test_steps_are_those_of_torch(N: int) -> None:
    weights, in_use, mean, square = fresh(N)
    truth = torch.nn.Parameter(weights.double())
    settings = {"lr": RATES.learning_rate, "betas": RATES.betas, "eps": RATES.eps, "weight_decay": RATES.weight_decay}
    optimizer = torch.optim.AdamW([truth], **settings)
    for step in range(1, 6):
        gradients = torch.randn(N) * 10.0 ** torch.randint(-6, 3, (N,))
        truth.grad = gradients.double() * 0.3
        optimizer.step()
        adamw(weights, in_use, gradients, mean, square, factors(step, scale=0.3), RATES)
        torch.testing.assert_close(weights.double(), truth.detach(), rtol=2e-6, atol=2e-7)
    state = optimizer.state[truth]
    torch.testing.assert_close(mean.double(), state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(square.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(in_use.float(), weights, rtol=2**-7, atol=0)  # the interpreter cuts off


@pytest.mark.usefixtures("kernels")
def test_a_skipped_step_changes_nothing_whatever_the_gradients() -> None:
    weights, in_use, mean, square = fresh(777)
    adamw(weights, in_use, torch.randn(777), mean, square, factors(1), RATES)
    before = [t.clone() for t in (weights, in_use, mean, square)]
    bad = torch.full((777,), torch.nan)
    adamw(weights, in_use, bad, mean, square, factors(2, float("inf"), skip=True), RATES)
    assert all(map(torch.equal, (weights, in_use, mean, square), before))


@pytest.mark.usefixtures("kernels")
def test_neighbours_in_the_flat_buffer_are_left_alone() -> None:
    around = [torch.full((132,), 3.0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, *[torch.float32] * 3)]
    adamw(*(t[1:-1] for t in around), factors(1), RATES)
    for buffer in around:
        assert buffer[0] == buffer[-1] == 3.0
    assert not (around[0][1:-1] == 3.0).any()
