"""The contract of every method of gating units over every kind of unit: the budget, the masks, the smaller model.

Letters: U units, L layers, B sequences, T tokens, H heads, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from tidegate.model import flops
from tidegate.model.clock import STILL, Clock
from tidegate.model.decoder import Decoder, DecoderOutput, ModelConfig, materialize, unit_gates_on_meta
from tidegate.model.unit_gates import UnitGatesConfig, UnitMethod
from tidegate.model.unit_gates.base import LogitGates
from tidegate.model.unit_gates.export import export
from tidegate.model.unit_gates.units import TOLERANCE, Group, Units

CPU = torch.device("cpu")
HEADS = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 8}
MIXTURE = {"kind": "moe", "num_experts": 7, "top_k": 2, "expert_dim": 32, "shared": {"num": 1}}
DENSE = {"kind": "dense", "hidden_dim": 52}

METHODS: dict[str, dict[str, Any]] = {
    "straight_through": {"kind": "straight_through"},
    "straight_through_plain": {"kind": "straight_through", "estimator": "plain"},
    "reinforce": {"kind": "reinforce"},
    "hard_concrete": {"kind": "hard_concrete"},
    "polarization": {"kind": "polarization"},
    "continuation": {"kind": "continuation"},
    "knapsack": {"kind": "knapsack"},
    "random": {"kind": "random"},
    "random_erk": {"kind": "random", "densities": "erk"},
    "dynamic_sparse": {"kind": "dynamic_sparse", "growth": "random", "every": 1},
    "dynamic_sparse_gradient": {"kind": "dynamic_sparse", "every": 2},
    "nested": {"kind": "nested", "keeps": [0.5, 1.0]},
}
FIXED = ("random", "random_erk", "nested")

OVER: dict[str, tuple[list[str], dict[str, Any], float]] = {
    "heads": (["heads"], MIXTURE, 0.5),
    "dense_channels": (["channels"], DENSE, 0.37),
    "expert_channels": (["channels"], MIXTURE, 0.5),
    "experts": (["experts"], MIXTURE, 0.5),
    "blocks": (["blocks"], MIXTURE, 0.5),
    "heads_and_dense_channels": (["heads", "channels"], DENSE, 0.37),
    "heads_and_experts": (["heads", "experts"], MIXTURE, 0.61),
    "heads_and_expert_channels": (["heads", "channels"], MIXTURE, 0.45),
}

REFUSED = {("polarization", "expert_channels"), ("polarization", "heads_and_expert_channels")} | {
    ("dynamic_sparse_gradient", over) for over in ("experts", "heads_and_experts")
}
PAIRS = [(method, over) for method in METHODS for over in OVER if (method, over) not in REFUSED]
every_pair = pytest.mark.parametrize(("method", "over"), PAIRS, ids=[f"{m}-{o}" for m, o in PAIRS])


def settings(method: str, over: str, **changes: Any) -> dict[str, Any]:
    kinds, ffn, keep = OVER[over]
    chosen = METHODS[method]
    if chosen["kind"] == "nested":
        chosen = {**chosen, "keeps": [keep, 1.0]}
    units = {"over": kinds, "keep": keep, "method": chosen, "freeze_tokens": None if method in FIXED else 1000}
    fields = {"vocab_size": 101, "width": 24, "num_layers": 4, "attention": HEADS, "ffn": ffn, "init_std": 0.2}
    return fields | {"units": units} | changes


def build(method: str, over: str, seed: int = 0, **changes: Any) -> Decoder:
    config = ModelConfig.model_validate(settings(method, over, **changes))
    return materialize(lambda: Decoder(config), CPU, seed)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, labels and which tokens count."""
    tokens, labels = torch.randint(101, (2, 2, 31)).unbind()
    return tokens, labels, torch.rand(2, 31) < 0.7


def alone(_: torch.Tensor) -> None:
    """The all-reduce of a world of one."""


def gates_of(model: Decoder) -> Any:
    assert model.units is not None
    return model.units


def train(model: Decoder, batch: Any, steps: range = range(1, 5), tokens: int = 100) -> None:
    """SGD steps that move the weights a little and the gates a lot."""
    gates = gates_of(model)
    for step in steps:
        clock = Clock(step, step * tokens, 3)
        loss = loss_of(model(*batch, clock=clock), batch)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    assert parameter.grad.isfinite().all(), name
                    parameter -= (1.0 if name.startswith("units.") else 0.01) * parameter.grad
        gates.update(model, clock, loss.detach(), alone)


def loss_of(output: DecoderOutput, batch: Any) -> torch.Tensor:
    assert output.unit_penalty is not None
    return output.nll / batch[2].sum() + output.unit_penalty


def share(model: Decoder, mask_U: torch.Tensor) -> float:
    units = gates_of(model).units
    return float((mask_U * units.costs(CPU)).sum()) / units.total_cost


def test_the_list_holds_every_method() -> None:
    kinds = {config.model_fields["kind"].default for config in get_args(get_args(UnitMethod)[0])}
    assert kinds == {method["kind"] for method in METHODS.values()}


@every_pair
def test_the_hard_mask_meets_the_budget(method: str, over: str, batch: Any) -> None:
    """Before, during and after training; expert channels alike in all experts of a layer and in multiples of 8."""
    model, keep = build(method, over), OVER[over][2]
    for _ in range(2):
        mask_U = gates_of(model).hard_mask()
        assert mask_U.unique().tolist() in ([0, 1], [1])
        assert abs(share(model, mask_U) - keep) <= TOLERANCE
        for layer in gates_of(model).units.split(mask_U):
            if layer.heads is not None:
                assert layer.heads.any()
            if layer.channels is not None:
                assert layer.channels.any()
            if layer.experts is not None:
                assert layer.experts.sum() >= MIXTURE["top_k"]
            if layer.expert_channels is not None:
                kept_E = layer.expert_channels.sum(dim=1)
                assert (kept_E == kept_E[0]).all()
                assert kept_E[0] >= 8
                assert kept_E[0] % 8 == 0
        train(model, batch)
    if method not in FIXED:
        assert not gates_of(model).frozen
        train(model, batch, range(9, 11))
        assert gates_of(model).frozen, "1,000 tokens"


@every_pair
def test_the_exported_model_is_smaller_and_equal(method: str, over: str, batch: Any) -> None:
    model = build(method, over)
    train(model, batch)
    model.eval()
    gates = gates_of(model)
    smaller, masked = export(model), model(*batch)
    dropped = (1 - share(model, gates.hard_mask())) * gates.units.total_cost
    before = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in gates.parameters())
    after = sum(p.numel() for p in smaller.parameters())
    if "heads" in OVER[over][0]:  # key/value heads that no query head uses are gone too
        spare = 4 * HEADS["num_kv_heads"] * 2 * 24 * HEADS["head_dim"]
        assert before - dropped - spare < after <= before - dropped + 0.5
    else:
        assert after == pytest.approx(before - dropped, abs=0.5)
    cut = smaller(*batch)
    torch.testing.assert_close(cut.nll_B, masked.nll_B, rtol=1e-5, atol=1e-5)
    assert cut.unit_penalty is None
    if masked.stats is not None:
        layers = enumerate(gates.units.split(gates.hard_mask()))
        kept = [number for number, layer in layers if layer.block is None or layer.block]
        assert torch.equal(cut.stats.counts_BE, masked.stats.counts_BE[kept])
        for field, expected in zip(cut.stats[:4], masked.stats[:4], strict=True):
            torch.testing.assert_close(field, expected[kept], rtol=1e-4, atol=1e-4)


@every_pair
def test_masks_follow_from_state_and_clock_alone(method: str, over: str, batch: Any) -> None:
    """The same masks in every pass of a step, with or without gradient, and from a checkpoint; on with the training."""
    model, resumed = build(method, over), build(method, over, seed=1)
    train(model, batch, range(1, 3))
    resumed.load_state_dict(model.state_dict())
    for step in (3, 4):
        clock = Clock(step, step * 100, 3)
        h = model.embedding.weight[batch[0]]
        with torch.no_grad():
            torch.rand(7)  # the global generator has no say
            counting = gates_of(model)(h, clock)
        passes = [gates_of(model)(h, clock), gates_of(resumed)(h, clock), counting]
        for other in passes[1:]:
            assert torch.equal(passes[0].penalty, other.penalty)
            for mine, same in zip(passes[0].masks, other.masks, strict=True):
                assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, same, strict=True))
        for copy in (model, resumed):
            gates = gates_of(copy)
            for name in ("_seen", "_gradients"):
                getattr(gates, name, []).clear()
            train(copy, batch, range(step, step + 1))
        assert torch.equal(gates_of(model).hard_mask(), gates_of(resumed).hard_mask())
    assert all(torch.equal(a, resumed.state_dict()[name]) for name, a in model.state_dict().items())


@every_pair
def test_recomputing_activations_changes_nothing(method: str, over: str, batch: Any) -> None:
    """Same loss, same gradients, same gates after the step."""
    clock, states, gradients = Clock(2, 200, 3), [], []
    for recompute in (False, True):
        model = build(method, over)
        model.recompute = recompute
        loss = loss_of(model(*batch, clock=clock), batch)
        loss.backward()
        gates_of(model).update(model, clock, loss.detach(), alone)
        states.append(model.state_dict())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)
    for name in ("mask_U", "mean_gate_U", "logits_U", "multiplier"):
        if f"units.{name}" in states[0]:
            torch.testing.assert_close(states[0][f"units.{name}"], states[1][f"units.{name}"])


@every_pair
def test_freezing_fixes_the_mask(method: str, over: str, batch: Any) -> None:
    """The step that reaches the tokens is the last with soft masks; then the cost is the budget and nothing moves."""
    model = build(method, over)
    gates = gates_of(model)
    if method in FIXED:
        assert gates.frozen == (METHODS[method]["kind"] == "random")
        return
    train(model, batch, range(8, 10))
    assert not gates.frozen
    train(model, batch, range(10, 11))
    assert gates.frozen
    mask_U = gates.hard_mask().clone()
    assert abs(float(gates.expected_cost()) / gates.units.total_cost - OVER[over][2]) <= TOLERANCE
    train(model, batch, range(11, 14))
    assert torch.equal(gates.hard_mask(), mask_U)
    passed = gates(model.embedding.weight[batch[0]], Clock(14, 1400, 3))
    assert passed.penalty == 0
    for layer, frozen in zip(passed.masks, gates.units.split(mask_U), strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(layer, frozen, strict=True))
    copy = build(method, over, seed=1)
    copy.load_state_dict(model.state_dict())
    assert gates_of(copy).frozen, "also after a restart"


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_gates(method: str, over: str, batch: Any) -> None:
    """Of the task alone, without the penalty; where a method learns by gradient."""
    if (method, over) in REFUSED:
        with pytest.raises(ValidationError, match=r"units\.over="):
            build(method, over)
        return
    model = build(method, over)
    model(*batch, clock=Clock(1, 100, 3)).nll.backward()
    gates = gates_of(model)
    names = [name for name, _ in gates.named_parameters()]
    assert bool(names) == isinstance(gates, LogitGates)
    for name, parameter in gates.named_parameters():
        assert parameter.ndim == 1, "not decayed"
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_pair
def test_without_a_clock_the_hard_mask_counts(method: str, over: str, batch: Any) -> None:
    model = build(method, over)
    still = model(*batch).nll_B
    model.eval()
    assert torch.equal(model(*batch).nll_B, still)
    assert torch.equal(model(*batch, clock=Clock(5, 500, 3)).nll_B, still), "evaluation knows no step"


@every_pair
def test_state_outside_the_optimizer_stays_fp32(method: str, over: str, batch: Any) -> None:
    model = build(method, over)
    before = {name: buffer.clone() for name, buffer in gates_of(model).named_buffers()}
    model.bfloat16()
    for name, buffer in gates_of(model).named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    output = model(*batch, clock=Clock(1, 100, 3))
    assert output.nll_B.isfinite().all()
    loss_of(output, batch).backward()


@every_pair
def test_configs_survive_json_and_costs_are_counted(method: str, over: str) -> None:
    config = ModelConfig.model_validate(settings(method, over))
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == flops.total(config, 31).params


def head_cost(config: ModelConfig) -> int:
    return unit_gates_on_meta(config).units.groups[0].cost


def test_a_unit_costs_its_parameters() -> None:
    def cost(over: str, **changes: Any) -> int:
        return head_cost(ModelConfig.model_validate(settings("random", over, **changes)))

    gate: Callable[..., Any] = lambda **gate: {"attention": {**HEADS, "gate": gate}}  # noqa: E731
    assert cost("heads", **gate(kind="none")) == 2 * 24 * 8  # query rows and output columns
    assert cost("heads") == 3 * 24 * 8, "and the rows of its gate"
    assert cost("heads", **gate(kind="sdpa_output", granularity="headwise")) == 2 * 24 * 8 + 24
    assert cost("heads", attention={**HEADS, "augmented_query": 20, "gate": {"kind": "none"}}) == (20 + 24) * 8
    assert cost("heads", **gate(kind="value")) == 2 * 24 * 8, "which belongs to a key/value head"
    assert cost("dense_channels") == cost("expert_channels") == 3 * 24
    assert cost("experts") == 3 * 24 * 32 + 24, "and its row of the router"
    whole = flops.total(ModelConfig.model_validate(settings("random", "blocks")), 31).params
    assert cost("blocks") == (whole - 2 * 101 * 24 - 24) / 4


GATES: list[dict[str, Any]] = [
    {"kind": kind, "granularity": granularity, "input": source, "form": form}
    for kind in ("sdpa_output", "value", "key", "query")
    for granularity in ("elementwise", "headwise")
    for source in ("hidden", "constant")
    for form in ("multiplicative", "additive")
] + [{"kind": "none"}, {"kind": "dense_output"}, {"kind": "dense_output", "form": "additive"}]


@pytest.mark.parametrize(("value_heads", "augmented_query"), [(None, None), (2, None), (2, 20)])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: "-".join(gate.values()))
def test_heads_leave_with_their_gates_and_key_value_heads(
    gate: dict[str, Any], value_heads: int | None, augmented_query: int | None, batch: Any
) -> None:
    """Any subset of heads, unevenly over the groups; also with documents and without QK-norm."""
    heads = {**HEADS, "num_value_heads": value_heads, "augmented_query": augmented_query}
    model = build("random", "heads", attention={**heads, "gate": gate, "qk_norm": False}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("constant"):
                parameter.normal_()
    gates = gates_of(model)
    mask_LH = torch.zeros(4, 6)
    for layer, kept in enumerate(((0,), (0, 1, 5), (1, 2, 3, 4, 5), (2, 3))):
        mask_LH[layer, list(kept)] = 1
    gates.frozen_mask.copy_(mask_LH.flatten())
    smaller = export(model)
    assert [block.attention.wk.weight.shape[0] // 8 for block in smaller.blocks] == [1, 2, 3, 1]
    of_three, of_two = [[0], [0, 0, 1], [0, 1, 1, 2, 2], [0, 0]], [[0], [0, 0, 1], [0, 0, 1, 1, 1], [0, 1]]
    of_values = of_two if value_heads else of_three
    assert [block.attention.key_of_head.tolist() for block in smaller.blocks] == of_three
    assert [block.attention.value_of_head.tolist() for block in smaller.blocks] == of_values
    assert [len(block.attention.wv.weight) // 8 for block in smaller.blocks] == [len(set(of)) for of in of_values]
    documents = torch.arange(31).expand(2, -1) // 9
    for extra in ((), (documents,)):
        torch.testing.assert_close(smaller(*batch, *extra).nll_B, model(*batch, *extra).nll_B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", [{"kind": "softmax_top_k"}, {"kind": "sigmoid_top_k"}], ids=lambda r: r["kind"])
def test_a_dropped_expert_is_never_chosen(router: dict[str, Any], batch: Any) -> None:
    """Whatever its bias; the others route as if it did not exist."""
    model = build("random", "experts", ffn={**MIXTURE, "router": router}).eval()
    gates = gates_of(model)
    mask_LE = torch.tensor([[1, 0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 1], [1] * 7, [0, 0, 0, 1, 1, 1, 0]]).float()
    gates.frozen_mask.copy_(mask_LE.flatten())
    for block in model.blocks:
        block.ffn.router.expert_bias.copy_(torch.linspace(1.0, -1.0, 7))
    masked, smaller = model(*batch), export(model)
    assert not (masked.stats.counts_BE * (1 - mask_LE[:, None])).any()
    assert not (masked.stats.prob_sums_BE * (1 - mask_LE[:, None])).any()
    assert [block.ffn.router.weight.shape[0] for block in smaller.blocks] == [2, 4, 7, 3]
    for field, expected in zip(smaller(*batch).stats[:4], masked.stats[:4], strict=True):
        torch.testing.assert_close(field, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(smaller(*batch).nll_B, masked.nll_B, rtol=1e-5, atol=1e-5)


def test_select_takes_the_best_mask_of_all_that_meet_the_budget() -> None:
    """Against all 2^18 subsets of 6 heads and 12 channels with different costs: most score times cost."""
    units = Units([Group(0, "heads", 1, 6, 50, (8, 8)), Group(0, "channels", 1, 12, 24, (8, 8))], 1)
    subsets = ((torch.arange(2**18)[:, None] >> torch.arange(18)) & 1).double()
    subsets = subsets[(subsets[:, :6].any(dim=1)) & (subsets[:, 6:].any(dim=1))]
    costs = units.costs(CPU).double()
    kept = subsets @ costs
    for keep in (0.33, 0.5, 0.75):
        for _ in range(10):
            scores = torch.randn(18)
            mask = units.select(scores, keep).double()
            error = abs(float(mask @ costs) - keep * units.total_cost)
            assert error <= TOLERANCE * units.total_cost
            near = (kept - keep * units.total_cost).abs() <= 12.0  # half the smaller cost
            best = (subsets[near] @ (scores.double() * costs)).max()
            assert float(mask @ (scores.double() * costs)) == pytest.approx(float(best), rel=1e-9)


def refused(message: str, method: str = "hard_concrete", over: str = "heads", **changes: Any) -> None:
    fields = settings(method, over)
    fields["units"] = {**fields["units"], **changes.pop("units", {})}
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(fields | changes)
    assert message in str(caught.value)


def test_a_budget_out_of_reach_is_refused_with_the_nearest() -> None:
    refused(
        "units.keep=0.5 is not within 1% of any choice among 3 of 23,272 parameters",
        over="blocks",
        num_layers=3,
    )
    refused("nearest: 0.3333 and 0.6667", over="blocks", num_layers=3)
    refused("nearest: 0.5417 and 0.5833", units={"keep": 0.56})
    refused("nearest: 0.2857", over="experts", units={"keep": 0.1})  # top_k of 7 in each layer
    refused(
        "units.keep=0.3 ",
        method="nested",
        over="blocks",
        units={"keep": 0.5, "method": {"kind": "nested", "keeps": [0.3, 0.5]}},
    )
    near = {"keep": 0.57, "over": ["heads"], "method": {"kind": "hard_concrete"}, "freeze_tokens": 10}
    assert ModelConfig.model_validate(settings("hard_concrete", "heads", units={**near, "keep": 0.59}))


def test_what_does_not_fit_is_refused() -> None:
    refused("units.over=['experts'] needs experts, but ffn.kind=dense", over="experts", ffn=DENSE)
    shared_gate = {**HEADS, "gate": {"kind": "sdpa_output", "heads": "shared"}}
    refused("attention.gate.heads=shared", attention=shared_gate)
    refused("gate it alone", units={"over": ["blocks", "heads"]})
    refused("choose one of them", over="experts", units={"over": ["experts", "channels"]})
    refused("names a kind twice", units={"over": ["heads", "heads"]})
    refused("freeze_tokens=None leaves method.kind=hard_concrete", units={"freeze_tokens": None})
    refused("freeze_tokens=5 does not fit method.kind=random", method="random", units={"freeze_tokens": 5})
    refused("keep=0.6 is not in method.keeps=[0.5, 1.0]", method="nested", units={"keep": 0.6})
    refused("growth=gradient", method="dynamic_sparse_gradient", over="experts")
    refused("gate experts", method="polarization", over="expert_channels")
    with pytest.raises(ValidationError, match="at least 1 item"):
        UnitGatesConfig.model_validate({"over": [], "method": {"kind": "random"}})


def test_a_share_of_the_experts_is_not_exported() -> None:
    model = build("random", "experts")
    model.blocks[1].ffn.experts.num_experts = 3
    with pytest.raises(ValueError, match=r"holds 3 of 7 experts; export from a process with parallel\.expert=1"):
        export(model)
    plain = materialize(lambda: Decoder(ModelConfig.model_validate(settings("random", "heads", units=None))), CPU, 0)
    with pytest.raises(ValueError, match="no unit gates"):
        export(plain)


def test_export_leaves_the_model_alone(batch: Any) -> None:
    model = build("knapsack", "heads_and_expert_channels").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = export(model)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not smaller.training
    assert STILL.step == 0
