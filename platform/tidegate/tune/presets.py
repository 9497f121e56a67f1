"""Presets: what gating leaves to choose, as variations of a job's paths, from `search.presets`.

A preset is a function of the job and of what the presets before it vary, so that its conditions hold in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from tidegate.config import ConfigError
from tidegate.model.moe import MoEConfig
from tidegate.model.routers import Capabilities, RouterConfig
from tidegate.train.job import Job
from tidegate.train.search import PresetName, Variation

__all__ = ["PRESETS", "space_with_presets"]

_GATE, _ROUTER, _UNITS = "model.attention.gate", "model.ffn.router", "model.units"
_NARROWEST = 32
"""Of an expert, so that unit gates can keep a fourth of its channels, which they close by 8."""
Variations = Mapping[str, Variation]


def space_with_presets(job: Job) -> dict[str, Variation]:
    """The job's `search.space` and what its `search.presets` add to it.

    Raises:
        ConfigError: a preset does not fit the job or another preset.
    """
    assert job.search is not None
    space: dict[str, Variation] = {}
    for name, preset in PRESETS.items():
        if name in job.search.presets:
            try:
                space |= preset(job, space)
            except ValueError as error:
                raise ConfigError(f"search.presets: {name} {error}") from error
    return space | job.search.space


def _gates(job: Job, space: Variations) -> dict[str, Variation]:
    """Positions and granularities of the attention gate, and none; its activation."""
    gates = [
        *({"kind": kind, "granularity": "elementwise"} for kind in ("sdpa_output", "value", "key", "query")),
        *({"kind": kind, "granularity": "headwise"} for kind in ("sdpa_output", "value", "key", "query")),
        {"kind": "dense_output", "granularity": "elementwise"},
    ]
    return {
        _GATE: Variation(choice=({"kind": "none"}, *gates)),
        f"{_GATE}.activation": Variation(choice=("sigmoid", "silu"), when={_GATE: tuple(gates)}),
    }


def _routers(job: Job, space: Variations) -> dict[str, Variation]:
    """Learned, causal routers with a fixed number of experts a token or a mean that is held."""
    _experts_of(job)
    kinds = ("softmax_top_k", "sigmoid_top_k", "sqrt_softplus_top_k", "top_p", "expert_threshold", "relu")
    return {_ROUTER: Variation(choice=tuple({"kind": kind} for kind in kinds))}


def _experts(job: Job, space: Variations) -> dict[str, Variation]:
    """Experts and experts a token, up to four times those of the job; none, one or a gated shared one."""
    moe = _experts_of(job)
    if moe.sizes:
        raise ValueError("does not fit model.ffn.sizes, whose experts are counted there")
    fewest = 1 if moe.top_k == 1 else 2  # one expert a token needs a router that does not divide its weight by itself
    shared = ({"num": 0, "gate": False}, {"num": 1, "gate": False}, {"num": 1, "gate": True})
    return {
        "model.ffn.num_experts": Variation(choice=tuple(moe.num_experts * times for times in (1, 2, 4))),
        "model.ffn.top_k": Variation(choice=tuple(range(fewest, min(4 * moe.top_k, moe.num_experts) + 1))),
        "model.ffn.shared": Variation(choice=shared),
    }


def _granularity(job: Job, space: Variations) -> dict[str, Variation]:
    """Experts cut in up to 8, and so many times more a token: the same active parameters but for the router's."""
    moe = _experts_of(job)
    if moe.sizes:
        raise ValueError("does not fit model.ffn.sizes, whose experts are cut already")
    if "model.ffn.num_experts" in space:
        raise ValueError("and experts both set model.ffn.num_experts; use one of them")
    parts = [parts for parts in (1, 2, 4, 8) if moe.expert_dim % (_NARROWEST * parts) == 0]
    if len(parts) < 2:
        raise ValueError(
            f"cannot cut model.ffn.expert_dim={moe.expert_dim} into multiples of {_NARROWEST}; make it one of "
            f"{2 * _NARROWEST}"
        )
    cut = tuple(
        {
            "num_experts": moe.num_experts * part,
            "top_k": moe.top_k * part,
            "expert_dim": moe.expert_dim // part,
            "shared": {"num": moe.shared.num * part},
        }
        for part in parts
    )
    return {"model.ffn": Variation(choice=cut)}


def _temperature(job: Job, space: Variations) -> dict[str, Variation]:
    """A router that cools from all experts to top_k over a third of the tokens: between which temperatures, and how."""
    _experts_of(job)
    cooling = {"kind": "dense_to_sparse", "anneal_tokens": max(1, job.train.tokens // 3)}
    others = space[_ROUTER].choice if _ROUTER in space else None
    when = {_ROUTER: (cooling,)}
    return {
        _ROUTER: Variation(choice=(*(others or ()), cooling)),
        f"{_ROUTER}.tau_start": Variation(log=(1.0, 8.0), when=when),
        f"{_ROUTER}.tau_end": Variation(log=(0.1, 0.9), when=when),
        f"{_ROUTER}.schedule": Variation(choice=("exponential", "linear"), when=when),
    }


def _balance(job: Job, space: Variations) -> dict[str, Variation]:
    """Scope and weight of the balance loss, and bias balancing where the router has a bias."""
    moe = _experts_of(job)
    scopes = ("sequence", "micro_batch", "data_parallel", "global_batch")
    added = {"balance.loss_weight": Variation(log=(1e-4, 1e-1))}
    for path, choice, fits in (
        ("balance.scope", scopes, lambda able: not able.own_balance_weight),
        ("balance.bias_rate", (0.0, 1e-3), lambda able: able.selection_bias),
    ):
        when = _routers_that(space, moe, fits)
        if when is not None:
            added[path] = Variation(choice=choice, when=when)
    if job.balance.bias_rate > 0 or getattr(moe.router, "quantile", None) is not None:
        added.pop("balance.bias_rate", None)  # how the job balances biases stays
    return added


def _unit_gates(job: Job, space: Variations) -> dict[str, Variation]:
    """What unit gates are over, how much they keep and how they learn it, random masks among them; or no unit gates."""
    if isinstance(job.model.ffn, MoEConfig) and job.model.ffn.sizes:
        raise ValueError("does not fit model.ffn.sizes, whose channels cannot be cut")
    freeze_tokens = 2 * job.train.tokens // 3
    gated: tuple[Any, ...] = tuple(
        {"over": list(over), "method": {"kind": kind}, "freeze_tokens": None if kind == "random" else freeze_tokens}
        for over in (("heads",), ("channels",), ("heads", "channels"))
        for kind in ("hard_concrete", "straight_through", "knapsack", "random")
    )
    return {
        _UNITS: Variation(choice=(None, *gated)),
        f"{_UNITS}.keep": Variation(choice=(0.25, 0.5, 0.75), when={_UNITS: gated}),  # heads are few: no other shares
    }


def _learning_rate(job: Job, space: Variations) -> dict[str, Variation]:
    """The largest learning rate, from a fourth of the job's to four times it."""
    peak = job.optimizer.schedule.peak
    return {"optimizer.schedule.peak": Variation(log=(peak / 4, peak * 4))}


PRESETS: dict[PresetName, Callable[[Job, Variations], dict[str, Variation]]] = {
    "gates": _gates,
    "routers": _routers,
    "experts": _experts,
    "granularity": _granularity,
    "temperature": _temperature,
    "balance": _balance,
    "unit_gates": _unit_gates,
    "learning_rate": _learning_rate,
}
"""In the order in which they are laid over each other."""


def _experts_of(job: Job) -> MoEConfig:
    if not isinstance(job.model.ffn, MoEConfig):
        raise ValueError(f"needs experts, but model.ffn.kind={job.model.ffn.kind}")
    return job.model.ffn


def _routers_that(
    space: Variations, moe: MoEConfig, fits: Callable[[Capabilities], bool]
) -> dict[str, tuple[Any, ...]] | None:
    """The condition that the router can do something; None if no router of the space, or the job's, can."""
    if _ROUTER not in space:
        return {} if fits(moe.capabilities) else None
    known: TypeAdapter[Any] = TypeAdapter(RouterConfig)
    able = tuple(value for value in space[_ROUTER].choice or () if fits(known.validate_python(value).capabilities))
    return {_ROUTER: able} if able else None
