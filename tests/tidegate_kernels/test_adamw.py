"""adamw against torch.optim.AdamW in fp64.

Letters: N weights.
"""

from __future__ import annotations

import pytest
import torch

from tidegate_kernels.adamw import Rates, StepFactors, adamw, step_factors
from tidegate_kernels.choice import chosen

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


def halves(N: int, value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((N,), value, dtype=torch.bfloat16), torch.full((N,), value, dtype=torch.bfloat16)


@pytest.mark.parametrize("place", [0, 1, 1000, 2**32 - 5, 2**40])
def test_bf16_moments_are_the_same_bits_in_pytorch_and_triton(place: int) -> None:
    """Also where hashes of places are those of another 2^32 weights."""
    results = []
    for kernels in ("reference", "triton"):
        torch.manual_seed(0)
        weights, in_use, *_ = fresh(777)
        mean, square = halves(777)
        with chosen(kernels):
            for step in range(1, 4):
                gradients = torch.randint(-64, 64, (777,)) / 64
                rates = RATES._replace(betas=(0.5, 0.5))  # exact products: no rounding but that of the moments
                adamw(weights, in_use, gradients, mean, square, factors(step), rates, place=place)
        results.append((mean, square))
    for actual, expected in zip(*results, strict=True):
        assert actual.equal(expected)
        assert expected.float().abs().sum() > 0


@pytest.mark.usefixtures("kernels")
def test_bf16_moments_are_right_in_the_mean_and_next_to_the_truth() -> None:
    N = 20_000
    weights, in_use, *_ = fresh(N)
    mean, square = halves(N)
    adamw(weights, in_use, torch.full((N,), 0.7123), mean, square, factors(3), RATES)
    for moment, truth in ((mean, 0.1 * 0.7123), (square, 0.05 * 0.7123**2)):
        values = moment.double().unique()
        assert len(values) == 2
        assert values[0] < truth < values[1]
        sigma = float(values[1] - values[0]) / 2 / N**0.5
        assert abs(float(moment.double().mean()) - truth) < 4 * sigma


@pytest.mark.usefixtures("kernels")
def test_bf16_moments_fall_where_the_nearest_would_stand_still() -> None:
    """beta2 = 0.999, no gradients: 200 steps take a mean of squares to 0.999^200 of itself."""
    N, rates = 4000, RATES._replace(betas=(0.9, 0.999))
    weights, in_use, *_ = fresh(N)
    mean, square = halves(N, 1.0)
    for step in range(1, 201):
        adamw(weights, in_use, torch.zeros(N), mean, square, factors(step), rates)
    assert float(torch.tensor(0.999).bfloat16()) == 1.0
    assert float(square.double().mean()) == pytest.approx(0.999**200, rel=3e-3)
    assert float(mean.abs().double().mean()) == pytest.approx(0.9**200, rel=0.1)


def test_roundings_hang_on_place_and_step_alone() -> None:
    """A part of the weights gets what it gets among all of them; another step and other moments get other bits."""
    N, gradients = 1000, torch.full((1000,), 0.7123)
    whole = halves(N)
    adamw(torch.ones(N), torch.ones(N), gradients, *whole, factors(1), RATES)
    part = halves(400)
    adamw(torch.ones(400), torch.ones(400), gradients[:400], *part, factors(1), RATES, place=600)
    for moment, piece in zip(whole, part, strict=True):
        assert moment[600:].equal(piece)
    later = halves(N)
    adamw(torch.ones(N), torch.ones(N), gradients, *later, factors(2), RATES)
    for moment, other in zip(whole, later, strict=True):
        assert 0.2 < float((moment == other).float().mean()) < 0.9
    up = [moment == moment.max() for moment in whole]
    assert 0.2 < float((up[0] == up[1]).float().mean()) < 0.9
