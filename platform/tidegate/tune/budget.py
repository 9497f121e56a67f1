"""Budgets: what a candidate may cost, computed from its job alone, so that none is started that exceeds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from tidegate.config import ConfigError
from tidegate.model.decoder import unit_gates_on_meta
from tidegate.model.flops import Cost, kv_cache_bytes, total
from tidegate.quantities import PREFIXES, count_shown
from tidegate.train.job import Job
from tidegate.train.memory import predict
from tidegate.train.search import SolveConfig
from tidegate.tune.measured import step_time

__all__ = ["QUANTITIES", "TOLERANCE", "Budget", "Quantity", "known_of", "parse", "shown", "solve", "violations"]

TOLERANCE = 0.01
"""How far a candidate may be from an `==` budget."""
_ROUNDING = 1e-9  # a job is within 100 % of itself


class Quantity(NamedTuple):
    """Something that a job costs."""

    of: Callable[[Job], float]
    unit: Literal["", "B", "FLOP", "s"]
    meaning: str


def _cost(job: Job) -> Cost:
    return total(job.model, job.data.sequence_length)


def _exported_params(job: Job) -> float:
    params = float(_cost(job).params)
    if (units := job.model.units) is None:
        return params
    gates = unit_gates_on_meta(job.model)
    dropped = (1 - units.keep) * gates.units.total_cost
    return params - sum(parameter.numel() for parameter in gates.parameters()) - dropped


QUANTITIES: dict[str, Quantity] = {
    "active_params": Quantity(lambda job: _cost(job).active_params, "", "parameters that a token multiplies with"),
    "total_params": Quantity(lambda job: _cost(job).params, "", "all parameters"),
    "exported_params": Quantity(_exported_params, "", "all that are left when unit gates have cut the model"),
    "flops_per_token": Quantity(
        lambda job: _cost(job).flops_per_token,
        "FLOP",
        "of training, forward and backward, at the job's sequence length",
    ),
    "peak_memory": Quantity(lambda job: predict(job).total, "B", "of a GPU at the largest moment, predicted"),
    "step_time": Quantity(step_time, "s", "a step, predicted from what search.measured holds"),
    "kv_cache": Quantity(
        lambda job: kv_cache_bytes(job.model), "B", "of keys and values a token of context at inference, in bf16"
    ),
}

_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_UNITS = {"": PREFIXES, "FLOP": PREFIXES, "B": _BYTES, "s": _SECONDS}
_SHOWN_BYTES = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "B": 1.0}
_SCALES = {"B": _SHOWN_BYTES, "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6}}
_BUDGET = re.compile(r"\s*(\w+)\s*(<=|==)\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


class Budget(NamedTuple):
    quantity: str
    exact: bool
    """`==`, within 1 %; else `<=`."""
    limit: float

    def excess(self, job: Job) -> float:
        """By which share a job misses it: 0 if it does not; negative if it is below what `==` asks for."""
        share = QUANTITIES[self.quantity].of(job) / self.limit - 1
        if self.exact:
            return 0.0 if abs(share) <= TOLERANCE else share
        return share if share > _ROUNDING else 0.0

    def __str__(self) -> str:
        return f"{self.quantity}{'==' if self.exact else '<='}{shown(self.quantity, self.limit)}"


def parse(text: str, base: Job) -> Budget:
    """A budget as people write it.

    Args:
        text: quantity, `<=` or `==`, number and unit; `%` is of what the base costs.
        base: the job as it stands.

    Raises:
        ConfigError: no such quantity, no such unit of it, not of this form, or a time and no measurement.
    """
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise ConfigError(f"budget {text!r} is not of the form active_params<=300M")
    name, relation, number, unit = match.groups()
    if name not in QUANTITIES:
        raise ConfigError(f"budget {text!r}: unknown quantity {name!r}; known are {', '.join(QUANTITIES)}")
    if name not in known_of(base):
        raise ConfigError(
            f"budget {text!r} needs search.measured, the file that `tidegate bench JOB --out FILE` writes of the job"
        )
    units = {"%": QUANTITIES[name].of(base) / 100} | _UNITS[QUANTITIES[name].unit]
    if unit not in units:
        raise ConfigError(
            f"budget {text!r}: unknown unit {unit!r} of {name}; known are {', '.join(filter(None, units))}"
        )
    limit = float(number) * units[unit]
    if limit <= 0:
        raise ConfigError(f"budget {text!r} leaves nothing")
    return Budget(name, relation == "==", limit)


def known_of(job: Job) -> dict[str, Quantity]:
    """Without a measurement, all but times."""
    timed = job.search is not None and job.search.measured is not None
    return {name: quantity for name, quantity in QUANTITIES.items() if timed or quantity.unit != "s"}


def violations(job: Job, budgets: Sequence[Budget]) -> dict[Budget, float]:
    """The budgets that a job misses, and by which share."""
    return {budget: excess for budget in budgets if (excess := budget.excess(job))}


def solve(jobs: Callable[[int], Job], budgets: Sequence[Budget], config: SolveConfig) -> int:
    """The value of `config.path` at which a job comes nearest to the `==` budgets, which all grow with it.

    Args:
        jobs: the job at a value.
        budgets: of them, the exact ones count; at least one.
        config: the values that may be tried.

    Raises:
        ConfigError: the job is not valid at a value that was tried.
    """
    exact = [budget for budget in budgets if budget.exact]
    assert exact
    values = range(config.smallest, config.largest + 1, config.step)

    def above(value: int) -> bool:
        """Whether the mean of the shares is too much."""
        job = jobs(value)
        return sum(QUANTITIES[budget.quantity].of(job) / budget.limit - 1 for budget in exact) > 0

    low, high = 0, len(values)
    while low < high:  # the first that is above
        middle = (low + high) // 2
        low, high = (low, middle) if above(values[middle]) else (middle + 1, high)
    near = [values[place] for place in (low - 1, low) if 0 <= place < len(values)]

    def miss(value: int) -> float:
        job = jobs(value)
        return max(abs(QUANTITIES[budget.quantity].of(job) / budget.limit - 1) for budget in exact)

    return min(near, key=miss)


def shown(quantity: str, value: float) -> str:
    """For people, three digits."""
    scales = _SCALES.get(QUANTITIES[quantity].unit)
    if scales is None:
        return count_shown(value)
    unit, size = next(((unit, size) for unit, size in scales.items() if value >= size), ("", 1.0))
    return f"{value / size:.3g}{unit}"
