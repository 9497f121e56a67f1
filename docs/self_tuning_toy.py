"""Self-tuning on ridge regression, whose best penalty is known: how near it comes, from where, and at what cost.

    python docs/self_tuning_toy.py

Inputs are uncorrelated, of many scales, so that the best weights under a penalty are a gate on each of those without:
what the response can express. The truth: the weights that minimise the training loss under a penalty have a closed
form, and so has their held-out loss, which a search over one number minimises.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar

from tidegate.model.clock import Clock
from tidegate.model.initialisation import Draw
from tidegate.model.self_tuning import BestResponse

WIDTH, TRAIN, HELD_OUT = 21, 64, 2048
STEPS, EVERY, RATE, SPREAD, ENTROPY = 6000, 2, 0.01, 0.3, 1e-4


class Problem(NamedTuple):
    train_x_ND: torch.Tensor
    train_y_N: torch.Tensor
    held_out_x_ND: torch.Tensor
    held_out_y_N: torch.Tensor

    def ridge(self, log_penalty: float) -> torch.Tensor:
        """(D,) weights that minimise the training loss, in closed form."""
        x_ND, y_N = self.train_x_ND, self.train_y_N
        penalty_DD = torch.e**log_penalty * torch.eye(x_ND.shape[1])
        return torch.linalg.solve(x_ND.T @ x_ND / len(x_ND) + penalty_DD, x_ND.T @ y_N / len(x_ND))

    def held_out_loss(self, weights_D: torch.Tensor) -> torch.Tensor:
        return (self.held_out_x_ND @ weights_D - self.held_out_y_N).square().mean()

    def best_log_penalty(self) -> float:
        """The logarithm of the penalty whose weights have the least held-out loss."""
        found = minimize_scalar(lambda u: float(self.held_out_loss(self.ridge(u))), bounds=(-9, 4), method="bounded")
        return float(found.x)


class Ended(NamedTuple):
    log_penalty: float
    held_out_loss: float
    passes: int
    """Gradients taken, of training and of held-out losses."""
    seconds: float


def problem(seed: int) -> Problem:
    """Inputs whose training covariance is diagonal, and noisy targets."""
    generator = torch.Generator().manual_seed(seed)
    scales_D = torch.logspace(0.3, -0.7, WIDTH)
    train_ND, _ = torch.linalg.qr(torch.randn(TRAIN, WIDTH, generator=generator))
    train_ND = train_ND * TRAIN**0.5 * scales_D
    held_out_ND = torch.randn(HELD_OUT, WIDTH, generator=generator) * scales_D
    weights_D = 0.5 * torch.randn(WIDTH, generator=generator)
    noise = [torch.randn(n, generator=generator) for n in (TRAIN, HELD_OUT)]
    return Problem(train_ND, train_ND @ weights_D + noise[0], held_out_ND, held_out_ND @ weights_D + noise[1])


def self_tuned(problem: Problem, start: float, steps: int = STEPS) -> Ended:
    """Train weights, response and penalty together, once."""
    response = BestResponse([start], {"units": (WIDTH,)}, SPREAD, 1.0, RATE, ENTROPY)
    response.init_weights(Draw(0, "response"))
    weights_D = torch.nn.Parameter(torch.zeros(WIDTH))
    optimizer = torch.optim.Adam([weights_D, *response.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    begun, passes = time.monotonic(), 0
    for step in range(1, steps + 1):
        point_H, gates = response(Clock(step, step, 0))
        gated_D = gates["units"] * weights_D
        residual_N = problem.train_x_ND @ gated_D - problem.train_y_N
        optimizer.zero_grad()
        (residual_N.square().mean() + point_H[0].exp() * gated_D.square().sum()).backward()
        optimizer.step()
        schedule.step()
        passes += 1
        if step % EVERY == 0:
            with response.listening() as heard:
                gates = response(Clock(step, step, 1)).gates
                loss = problem.held_out_loss(gates["units"] * weights_D)
                response.move(torch.autograd.grad(loss, heard))
            passes += 1
    seconds = time.monotonic() - begun
    with torch.no_grad():
        gates = response(Clock(0, 0, 0)).gates
        loss = float(problem.held_out_loss(gates["units"] * weights_D))
    return Ended(float(response.location), loss, passes, seconds)


def main() -> None:
    for seed in range(3):
        data = problem(seed)
        best = data.best_log_penalty()
        least = float(data.held_out_loss(data.ridge(best)))
        print(f"seed {seed}: the best penalty is {torch.e**best:.4f}, held-out loss {least:.5f}")
        for start in (best - 3, best + 3):
            ended = self_tuned(data, start)
            error = torch.e ** (ended.log_penalty - best) - 1
            print(
                f"  from {torch.e**start:.4f}: {torch.e**ended.log_penalty:.4f} ({100 * error:+.1f} %), held-out loss "
                f"{ended.held_out_loss:.5f}, {ended.passes / STEPS:.2f} gradients a step, {ended.seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
