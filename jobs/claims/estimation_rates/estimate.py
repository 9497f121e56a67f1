"""How fast maximum likelihood finds a mixture of experts, by its gate: simulated, on one CPU core.

y given x is a mixture of E Gaussian regressions, N(slope x + intercept, sigma^2), weighted by a gate. Of each gate,
many samples of growing size n are fitted from a start near the truth; log error against log n has the rate as its
slope. `python jobs/claims/estimation_rates/estimate.py` writes results.json and rates.png beside this file.

Source: Nguyen et al., ICLR 2024 (arXiv 2309.13850), for the top-k softmax; Nguyen, Akbarian & Ho, ICML 2024 (arXiv
2401.13875), for the temperature and the activation before it.

Letters: N samples, E experts, K used of them, G points of a grid of y.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize

HERE = Path(__file__).resolve().parent
SIZES = [500 * 2**doubling for doubling in range(8)]
START_SPREAD = 0.3
"""Standard deviation of a start around the truth, the same for every n."""
SMALLEST_SIGMA = 0.1
"""The proofs take a compact set; without a floor the likelihood has no maximum: one expert may fit a single sample."""
WIDTH = 3.0
"""x is uniform in (-WIDTH, WIDTH)."""


class Parameters(NamedTuple):
    """Of a mixture; all fp64."""

    gate_E2: torch.Tensor
    """Slope and intercept of each expert's score. Those of the last are 0: only differences matter."""
    expert_E2: torch.Tensor
    """Slope and intercept of each expert's mean."""
    sigma_E: torch.Tensor
    temperature: torch.Tensor
    """()"""


Gate = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Scores (N, E), the temperature () and a softness, 0 for the gate itself, to the logarithm of each expert's weight."""


def top_k(number: int) -> Gate:
    """Softmax over the `number` largest scores of a row.

    The likelihood jumps where a sample changes experts, and no gradient crosses a jump. With a softness, a score may
    pass the middle between the last chosen and the first left out by about as much before it is out.
    """

    def gate(scores_NE: torch.Tensor, temperature: torch.Tensor, softness: float) -> torch.Tensor:
        sorted_NE, order_NE = scores_NE.sort(dim=-1, descending=True)
        if softness:
            middle_N1 = sorted_NE[:, number - 1 : number + 1].mean(dim=-1, keepdim=True)
            return (scores_NE + F.logsigmoid((scores_NE - middle_N1) / softness)).log_softmax(dim=-1)
        return scores_NE.scatter(-1, order_NE[:, number:], -torch.inf).log_softmax(dim=-1)

    return gate


def dense_to_sparse(activation: Callable[[torch.Tensor], torch.Tensor]) -> Gate:
    """Softmax of activated scores over the temperature."""
    return lambda scores_NE, temperature, softness: (activation(scores_NE) / temperature).log_softmax(dim=-1)


def log_density(
    parameters: Parameters, gate: Gate, x_N: torch.Tensor, y_NG: torch.Tensor, softness: float = 0.0
) -> torch.Tensor:
    """(N, G) of each row's y given its x."""
    x_N2 = torch.stack([x_N, torch.ones_like(x_N)], dim=-1)
    weights_NE = gate(x_N2 @ parameters.gate_E2.T, parameters.temperature, softness)
    means_NE = x_N2 @ parameters.expert_E2.T
    away_NGE = (y_NG[:, :, None] - means_NE[:, None, :]) / parameters.sigma_E
    normal_NGE = -0.5 * away_NGE.square() - parameters.sigma_E.log() - 0.5 * np.log(2 * np.pi)
    return (weights_NE[:, None, :] + normal_NGE).logsumexp(dim=-1)


def sample(parameters: Parameters, gate: Gate, number: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """x (N,) and y (N, 1)."""
    x_N = (torch.rand(number, generator=generator, dtype=torch.float64) * 2 - 1) * WIDTH
    x_N2 = torch.stack([x_N, torch.ones_like(x_N)], dim=-1)
    weights_NE = gate(x_N2 @ parameters.gate_E2.T, parameters.temperature, 0.0).exp()
    chosen_N = weights_NE.multinomial(1, generator=generator).squeeze(-1)
    noise_N = torch.randn(number, generator=generator, dtype=torch.float64) * parameters.sigma_E[chosen_N]
    return x_N, ((x_N2 * parameters.expert_E2[chosen_N]).sum(dim=-1) + noise_N)[:, None]


def flatten(parameters: Parameters, has_temperature: bool) -> torch.Tensor:
    """What is fitted, in one vector; positive numbers as logarithms."""
    free = [parameters.gate_E2[:-1], parameters.expert_E2, parameters.sigma_E.log()]
    free += [parameters.temperature.log()] if has_temperature else []
    return torch.cat([part.flatten() for part in free])


def unflatten(vector: torch.Tensor, experts: int, has_temperature: bool) -> Parameters:
    gate, expert, sigma, temperature = vector.split([2 * experts - 2, 2 * experts, experts, int(has_temperature)])
    gate_E2 = torch.cat([gate.view(-1, 2), torch.zeros(1, 2, dtype=vector.dtype)])
    return Parameters(
        gate_E2,
        expert.view(-1, 2),
        sigma.exp().clamp(min=SMALLEST_SIGMA),
        temperature.exp().sum() if has_temperature else ONE,
    )


def fit(start: Parameters, gate: Gate, has_temperature: bool, x_N: torch.Tensor, y_N1: torch.Tensor) -> Parameters:
    """Where BFGS ends from `start`, with ever less softness: a maximum of the likelihood, or a point on its ridge."""
    experts = len(start.sigma_E)

    def loss(flat: NDArray[np.float64], softness: float) -> tuple[float, NDArray[np.float64]]:
        vector = torch.tensor(flat, requires_grad=True)
        value = -log_density(unflatten(vector, experts, has_temperature), gate, x_N, y_N1, softness).mean()
        (gradient,) = torch.autograd.grad(value, vector)
        return value.item(), gradient.numpy()

    flat = flatten(start, has_temperature).numpy()
    for softness in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0):
        flat = minimize(loss, flat, (softness,), jac=True, method="BFGS", options={"gtol": 1e-7}).x
    return unflatten(torch.tensor(flat), experts, has_temperature)


Errors = Callable[[Parameters, Parameters], Mapping[str, torch.Tensor]]
"""Of what is fitted against the truth, each a distance."""


class Setting(NamedTuple):
    """A gate, the truth, where fits begin, and what is measured."""

    gate: Gate
    truth: Parameters
    start: Parameters
    has_temperature: bool
    errors: Errors
    expected: Mapping[str, str]
    """What the paper proves of each error."""


ONE = torch.ones((), dtype=torch.float64)


def _parameters(
    gate: list[list[float]], expert: list[list[float]], sigma: list[float], temperature: float = 1.0
) -> Parameters:
    return Parameters(*(torch.tensor(part, dtype=torch.float64) for part in (gate, expert, sigma, temperature)))


def _experts(fitted: Parameters, truth: Parameters) -> torch.Tensor:
    return (fitted.expert_E2 - truth.expert_E2).norm() + (fitted.sigma_E - truth.sigma_E).norm()


def _exact(fitted: Parameters, truth: Parameters) -> Mapping[str, torch.Tensor]:
    return {"gate": (fitted.gate_E2 - truth.gate_E2).norm(), "experts": _experts(fitted, truth)}


def _with_temperature(fitted: Parameters, truth: Parameters) -> Mapping[str, torch.Tensor]:
    scores = fitted.gate_E2 / fitted.temperature - truth.gate_E2 / truth.temperature
    own = {"temperature": (fitted.temperature - truth.temperature).abs(), "gate over temperature": scores.norm()}
    return {**_exact(fitted, truth), **own}


def _one_too_many(fitted: Parameters, truth: Parameters) -> Mapping[str, torch.Tensor]:
    """Distance of each fitted expert to the nearest true one, weighted by the share that its gate gives it."""
    x_N = torch.linspace(-WIDTH, WIDTH, 201, dtype=torch.float64)
    x_N2 = torch.stack([x_N, torch.ones_like(x_N)], dim=-1)
    share_E = (x_N2 @ fitted.gate_E2.T).softmax(dim=-1).mean(dim=0)
    own_E3, true_E3 = (torch.cat([p.expert_E2, p.sigma_E[:, None]], dim=-1) for p in (fitted, truth))
    return {"experts": (share_E * torch.cdist(own_E3, true_E3).min(dim=1).values).sum()}


def hellinger(setting: Setting, fitted: Parameters) -> torch.Tensor:
    """Distance of the densities, averaged over x."""
    x_N = torch.linspace(-WIDTH, WIDTH, 101, dtype=torch.float64)
    y_G = torch.linspace(-16, 16, 1601, dtype=torch.float64)
    own, true = (
        (log_density(p, setting.gate, x_N, y_G.expand(len(x_N), -1)) / 2).exp() for p in (fitted, setting.truth)
    )
    return (0.5 * torch.trapezoid((own - true).square(), y_G, dim=-1).mean()).sqrt()


_THREE = _parameters([[1.0, 0.5], [-1.0, 0.5], [0.0, 0.0]], [[2.0, 1.0], [-1.0, 3.0], [0.5, -4.0]], [0.5, 0.7, 0.6])
_TWO = ([[2.0, 1.0], [-1.0, -2.0]], [0.5, 0.7])
_PAIR = _parameters([[0.8, 0.3], [0.0, 0.0]], *_TWO)
_COOLED = _parameters([[0.8, 0.3], [0.0, 0.0]], *_TWO, temperature=0.5)
_SPLIT = _parameters([[0.8, -0.4], [0.8, -0.4], [0.0, 0.0]], [[2.0, 1.3], [2.0, 0.7], [-1.0, -2.0]], [0.5, 0.5, 0.7])
_HALF = "-1/2"
_SAME = torch.Tensor.clone
SETTINGS: Mapping[str, Setting] = {
    "top-2 of 3, as many as there are": Setting(
        top_k(2), _THREE, _THREE, False, _exact, dict.fromkeys(("density", "gate", "experts"), _HALF)
    ),
    "softmax, one more than there are": Setting(
        dense_to_sparse(_SAME), _PAIR, _SPLIT, False, _one_too_many, {"density": _HALF, "experts": "-1/4"}
    ),
    "temperature": Setting(
        dense_to_sparse(_SAME),
        _COOLED,
        _COOLED,
        True,
        _with_temperature,
        {"density": _HALF, "gate": "slower than any power", "temperature": "slower than any power"},
    ),
    "temperature after tanh": Setting(
        dense_to_sparse(torch.tanh),
        _COOLED,
        _COOLED,
        True,
        _with_temperature,
        dict.fromkeys(("density", "gate", "experts", "temperature"), _HALF),
    ),
}


def measure(setting: Setting, number: int, seed: int) -> dict[str, float]:
    """Errors of one fit to `number` samples."""
    generator = torch.Generator().manual_seed(seed)
    x_N, y_N1 = sample(setting.truth, setting.gate, number, generator)
    flat = flatten(setting.start, setting.has_temperature)
    flat = flat + START_SPREAD * torch.randn(len(flat), generator=generator, dtype=torch.float64)
    start = unflatten(flat, len(setting.start.sigma_E), setting.has_temperature)
    fitted = fit(start, setting.gate, setting.has_temperature, x_N, y_N1)
    errors = {"density": hellinger(setting, fitted), **setting.errors(fitted, setting.truth)}
    return {name: error.item() for name, error in errors.items()}


def slope(sizes: list[int], errors_SR: NDArray[np.float64]) -> float:
    """Of the logarithm of the median error over R repetitions against that of the S sizes."""
    return float(np.polyfit(np.log(sizes), np.log(np.median(errors_SR, axis=1)), 1)[0])


def spread(sizes: list[int], errors_SR: NDArray[np.float64]) -> tuple[float, float]:
    """The slope's 95 % interval, repetitions drawn anew 1,000 times."""
    random = np.random.default_rng(0)
    repetitions = errors_SR.shape[1]
    drawn = [slope(sizes, errors_SR[:, random.integers(repetitions, size=repetitions)]) for _ in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, object]] = {}
    for name, setting in SETTINGS.items():
        fits = [[measure(setting, number, seed) for seed in range(arguments.repetitions)] for number in SIZES]
        found[name] = {}
        for error in fits[0][0]:
            errors_SR = np.array([[fitted[error] for fitted in row] for row in fits])
            low, high = spread(SIZES, errors_SR)
            found[name][error] = {
                "slope": slope(SIZES, errors_SR),
                "interval": [low, high],
                "expected": setting.expected.get(error, ""),
                "median": np.median(errors_SR, axis=1).tolist(),
            }
            print(f"{name}: {error}: slope {slope(SIZES, errors_SR):+.3f} ({low:+.3f} .. {high:+.3f})", flush=True)
    about = {"commit": git.stdout.strip(), "repetitions": arguments.repetitions, "hardware": f"{os.cpu_count()} cores"}
    document = {"about": about, "sizes": SIZES, "settings": found}
    (arguments.out / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(document, arguments.out / "rates.png")


def draw(document: Mapping[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    settings: Mapping[str, Mapping[str, Any]] = document["settings"]
    figure, panels = plt.subplots(1, len(settings), figsize=(4 * len(settings), 3.6), sharey=True, layout="constrained")
    for axes, (name, errors) in zip(panels, settings.items(), strict=True):
        for error, row in errors.items():
            axes.loglog(SIZES, row["median"], "o-", label=f"{error} ({row['slope']:+.2f})")
        axes.set(title=name, xlabel="samples")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("median error")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
