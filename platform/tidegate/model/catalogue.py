"""What there is to choose from, a line and a paper each: what `tidegate list` prints.

Kinds with a class of their own say it themselves; what is a value of a field or an option of many kinds stands here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from tidegate.model.mixers import MixerConfig
from tidegate.model.norms import NormConfig
from tidegate.model.routers import RouterConfig
from tidegate.model.unit_gates import FIXED, UnitMethod

__all__ = ["SUBJECTS", "Choice", "choices"]

Subject = Literal["routers", "gates", "mixers", "balance"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)


class Choice(NamedTuple):
    name: str
    yaml: str
    """The line in a job that chooses it."""
    summary: str
    source: str


def choices(subject: Subject) -> list[Choice]:
    """Everything of one subject, in the order of its list."""
    match subject:
        case "routers":
            return [*_kinds(RouterConfig, "model.ffn.router: {{{it}}}"), *_ROUTER_OPTIONS]
        case "gates":
            return [*_ATTENTION, *_kinds(NormConfig, "model.norm: {{{it}}}"), *_unit_gates(), *_ACTIVATIONS]
        case "mixers":
            return _mixers()
        case "balance":
            return list(_BALANCE)


def _unit_gates() -> list[Choice]:
    end = ", freeze_tokens: 400000"
    found = _kinds(UnitMethod, "model.units: {{over: [heads], keep: 0.5, method: {{{it}}}" + end + "}}")
    fixed = {variant.model_fields["kind"].default for variant in FIXED}
    return [choice._replace(yaml=choice.yaml.replace(end, "")) if choice.name in fixed else choice for choice in found]


def _mixers() -> list[Choice]:
    found = _kinds(MixerConfig, "model: {{layers: 'attention, mine', mixers: {{mine: {{{it}}}}}}}")
    below = next(choice.yaml for choice in found if choice.name == "kda")  # a GMU reads what a linear mixer publishes
    unit = below.replace("'attention, mine'", "'mine, unit'").replace("}}}", "}, unit: {kind: gmu}}}")
    return [choice._replace(yaml=unit) if choice.name == "gmu" else choice for choice in found]


def _kinds(union: Any, line: str) -> list[Choice]:
    """The variants of a discriminated union; `line` is their YAML, with `{it}` in the place of their fields."""
    found = []
    for variant in get_args(get_args(union)[0]):
        name = variant.model_fields["kind"].default
        fields = ", ".join(filter(None, [f"kind: {name}", variant.example]))
        found.append(Choice(name, line.format(it=fields), variant.summary, variant.source))
    return found


_ROUTER_OPTIONS = (
    Choice(
        "pre-gated",
        "model.ffn.router: {reads: previous_block}",
        "a top-k router that reads the block before, so that a block's experts are known before it begins",
        "Pre-gated MoE, Hwang et al., ISCA 2024, arXiv 2308.12066",
    ),
    Choice(
        "group-limited",
        "model.ffn.router: {groups: {num: 8, keep: 4}}",
        "a top-k router that uses experts of few groups (nodes) only",
        "DeepSeek-V3, arXiv 2412.19437",
    ),
    Choice(
        "uneven experts",
        "model.ffn.sizes: [{num: 4, times: 2}, {num: 2, times: 0}]",
        "big, small and identity experts, with balance.budget and the oracle gap (train.oracle_sequences)",
        "Duo-LLM, arXiv 2410.10846",
    ),
)

_PAPER = "Qiu et al. 2025, arXiv 2505.06708"
_ATTENTION = (
    Choice("sdpa_output", "model.attention.gate: {kind: sdpa_output}", "G1: gate after SDPA, the default", _PAPER),
    Choice("value", "model.attention.gate: {kind: value}", "G2: gate after the value projection", _PAPER),
    Choice("key", "model.attention.gate: {kind: key}", "G3: gate after the key projection", _PAPER),
    Choice("query", "model.attention.gate: {kind: query}", "G4: gate after the query projection", _PAPER),
    Choice(
        "dense_output", "model.attention.gate: {kind: dense_output}", "G5: gate after the output projection", _PAPER
    ),
    Choice("input-independent", "model.attention.gate: {input: constant}", "control: a learned constant gate", _PAPER),
    Choice("none", "model.attention.gate: {kind: none}", "plain attention", _PAPER),
    Choice(
        "learnable_sink",
        "model.attention.softmax: learnable_sink",
        "a learned logit a head that takes attention away: the gate sigmoid(lse - sink)",
        "gpt-oss 2025",
    ),
    Choice(
        "off_by_one",
        "model.attention.softmax: off_by_one",
        "a sink of logit 0: 1 + sum of exponentials in the denominator",
        "Miller 2023",
    ),
    Choice(
        "DiffQKV",
        "model.attention: {num_kv_heads: 2, num_value_heads: 4}",
        "fewer key heads than value heads",
        "Sigma, arXiv 2501.13629",
    ),
    Choice(
        "augmented Q",
        "model.attention.augmented_query: 3072",
        "queries through a SwiGLU, which no cache holds; with DiffQKV",
        "Sigma, arXiv 2501.13629",
    ),
    Choice("qk_norm", "model.attention.qk_norm: true", "RMSNorm of queries and keys, the default", "arXiv 2302.05442"),
    Choice(
        "qk_clip",
        "model.attention: {qk_clip: 100, qk_norm: false}",
        "after a step, scale down the projections of heads whose logits passed a threshold",
        "Kimi K2 2025, arXiv 2507.20534",
    ),
)
_ACTIVATIONS = (
    Choice("swiglu", "model.ffn.activation: swiglu", "silu(W1 x) * W3 x, the default", "arXiv 2002.05202"),
    Choice("geglu", "model.ffn.activation: geglu", "gelu(W1 x) * W3 x", "arXiv 2002.05202"),
    Choice("relu2", "model.ffn.activation: relu2", "relu(W1 x)^2, two matrices", "Primer, arXiv 2109.08668"),
    Choice(
        "poly_relu", "model.ffn.activation: poly_relu", "a learned cubic of relu(W1 x)", "PolyCom, arXiv 2411.03884"
    ),
    Choice(
        "poly_norm",
        "model.ffn.activation: poly_norm",
        "a learned cubic of normalised powers",
        "PolyCom, arXiv 2411.03884",
    ),
)
_DEMONS = "Qiu et al. 2025, arXiv 2501.11873"
_BALANCE = (
    Choice(
        "global_batch",
        "balance: {scope: global_batch}",
        "balance loss over every rank and accumulation step, the default; exact at any world size",
        _DEMONS,
    ),
    Choice(
        "running counts",
        "balance: {counts: running}",
        "global_batch from what a step has counted so far: no second pass, an approximation",
        _DEMONS + ", Algorithm 1",
    ),
    Choice("data_parallel", "balance: {scope: data_parallel}", "over one micro-batch of every rank", _DEMONS),
    Choice("micro_batch", "balance: {scope: micro_batch}", "over each rank's micro-batch", "arXiv 2101.03961"),
    Choice("sequence", "balance: {scope: sequence}", "over each sequence", "DeepSeek-V3, arXiv 2412.19437"),
    Choice("z-loss", "balance: {z_loss_weight: 1.0e-3}", "keeps router logits small", "ST-MoE, arXiv 2202.08906"),
    Choice(
        "bias balancing",
        "balance: {bias_rate: 1.0e-3, loss_weight: 0}",
        "steps a selection bias towards balance, without a loss",
        "Wang et al. 2024, arXiv 2408.15664",
    ),
    Choice(
        "quantile balancing",
        "model.ffn.router: {quantile: {}}",
        "sets the selection bias to the quantile of the global batch that balances it",
        "Su 2026",
    ),
    Choice(
        "adaptive L1",
        "model.ffn.router: {kind: relu}",
        "the balance loss of ReLU gates, its weight steered to the budget; comes with the router",
        "ReMoE, arXiv 2412.14711",
    ),
    Choice(
        "transport plan",
        "model.ffn.router: {kind: sinkhorn}",
        "balanced assignment on few steps; comes with the router",
        "arXiv 2511.08972",
    ),
    Choice(
        "budget",
        "balance: {budget: {target: 0.5}}",
        "holds the mean cost of uneven experts over all layers",
        "Duo-LLM, arXiv 2410.10846",
    ),
)
