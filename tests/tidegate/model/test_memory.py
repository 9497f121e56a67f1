"""What a pass is predicted to hold is what a real one holds: on the Triton kernels, and on plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves

from tidegate.model import memory
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, DecoderOutput, ModelConfig, materialize
from tidegate.model.memory import LiveBytes, PassMemory, inner_bytes, model_on_meta, pass_memory
from tidegate_kernels.choice import Kernels, chosen
from tidegate_kernels.swiglu import triton as swiglu

B, T = 2, 24
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "width": 48,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "ffn": {"kind": "moe", "num_experts": 5, "top_k": 2, "expert_dim": 32, "shared": {"num": 1}},
}
DENSE = {"ffn": {"kind": "dense", "hidden_dim": 96}}
INTERPRETED: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense_without_gate": {**DENSE, "attention": {"gate": {"kind": "none"}}},
    "headwise_gate_and_gated_norm": {
        "attention": {"gate": {"kind": "sdpa_output", "granularity": "headwise"}},
        "norm": {"kind": "gated"},
    },
    "value_heads": {"attention": {"num_value_heads": 4}},
    "augmented_query": {"attention": {"num_value_heads": 4, "augmented_query": 48}},
    "value_gate_and_poly_norm": {
        "attention": {"gate": {"kind": "value", "form": "additive"}, "softmax": "learnable_sink"},
        "ffn": {"activation": "poly_norm"},
    },
    "uneven": {
        "ffn": {"sizes": [{"num": 1, "times": 2}, {"num": 3, "times": 1}, {"num": 1, "times": 0}]},
        "attention": {"qk_norm": False},
        "tie_embeddings": True,
        "vocab_size": 101,
    },
}
PLAIN: dict[str, dict[str, Any]] = {
    **INTERPRETED,
    "query_gate": {"attention": {"gate": {"kind": "query", "heads": "shared"}}, "norm": {"kind": "pre_affine"}},
    "dense_output_gate": {"attention": {"gate": {"kind": "dense_output", "input": "constant"}}},
    "hash": {"ffn": {"router": {"kind": "hash"}}},
    "thor": {"ffn": {"router": {"kind": "thor"}}},
    "hybrid": {
        "layers": "kda, attention",
        "mixers": {"kda": {"kind": "kda", "num_heads": 3, "key_dim": 8, "value_dim": 16}},
    },
    "dynamic_mask": {"layers": "best, attention", "mixers": {"best": {"kind": "dynamic_mask", "keep": 5}}},
    "gam": {"layers": "bank, attention", "mixers": {"bank": {"kind": "gam", "slots": 40}}},
    "unit_gates": {
        "units": {"over": ["heads", "channels"], "keep": 0.5, "freeze_tokens": 9, "method": {"kind": "hard_concrete"}}
    },
}


def config_of(changes: dict[str, Any]) -> ModelConfig:
    merged = {**SIZES, **changes}
    for key in ("attention", "ffn"):
        if changes.get(key, {}).get("kind") != "dense":
            merged[key] = {**SIZES[key], **changes.get(key, {})}
    return ModelConfig.model_validate(merged)


def real_model(config: ModelConfig, recompute: bool = False) -> Decoder:
    return materialize(lambda: Decoder(config, recompute=recompute), CPU, seed=0).to(torch.bfloat16)


def batch(config: ModelConfig) -> tuple[torch.Tensor, ...]:
    tokens = torch.randint(0, config.vocab_size, (B, T))
    documents = torch.arange(T, dtype=torch.int32).div(7, rounding_mode="floor").expand(B, -1).contiguous()
    return tokens, tokens.roll(-1, dims=1), torch.ones(B, T, dtype=torch.bool), documents


def loss_of(output: DecoderOutput) -> torch.Tensor:
    loss = output.nll
    if output.stats is not None:
        stats = output.stats
        loss = loss + stats.prob_sums_BE.sum() + stats.z_sums_B.sum() + stats.penalty_sums_B.sum()
    return loss if output.unit_penalty is None else loss + output.unit_penalty


def predicted(config: ModelConfig, kernels: Kernels, recompute: bool = False) -> PassMemory:
    model = model_on_meta(config, torch.bfloat16, recompute=recompute)
    return pass_memory(model, micro_batch=B, sequence_length=T, isolate=True, kernels=kernels)


@pytest.mark.parametrize("case", INTERPRETED)
def test_what_autograd_saves_on_the_kernels_of_a_gpu_is_predicted(case):
    config = config_of(INTERPRETED[case])
    model = real_model(config)
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x
        return x

    with chosen("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*batch(config), clock=Clock(1, 1, 0))
    found = sum(x.untyped_storage().nbytes() for x in saved.values())
    assert predicted(config, "auto").saved == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", PLAIN)
def test_the_largest_moments_of_a_pass_are_predicted(case, recompute):
    config = config_of(PLAIN[case])
    model, given = real_model(config, recompute), batch(config)
    live = LiveBytes([*model.parameters(), *model.buffers(), *given])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with chosen("reference"), live:
        output = model(*given, clock=Clock(1, 1, 0))
        found = [live.now, live.peak]
        live.peak = live.now
        loss_of(output).backward()
    assert [*predicted(config, "reference", recompute)] == pytest.approx([*found, live.peak], rel=0.1)


def test_a_gpu_keeps_what_cudnn_keeps_where_documents_are_joined():
    """Queries, keys, values, output and log-sum-exp, as our own attention does: not a matrix of scores."""
    model = model_on_meta(config_of({}), torch.bfloat16)
    apart, joined = (
        pass_memory(model, micro_batch=2, sequence_length=256, isolate=isolate, kernels="auto").saved
        for isolate in (True, False)
    )
    assert joined == pytest.approx(apart, rel=0.05)


def test_saved_bytes_grow_with_layers_and_tokens_and_recompute_keeps_a_block():
    def saved(recompute: bool = False, batch: int = 4, **changes: Any) -> int:
        model = model_on_meta(config_of(changes), torch.bfloat16, recompute=recompute)
        return pass_memory(model, micro_batch=batch, sequence_length=64, isolate=True, kernels="auto").saved

    _, two, three, four = (saved(num_layers=layers) for layers in (1, 2, 3, 4))
    assert four - three == three - two > 0
    assert saved(batch=8) - saved(batch=4) == pytest.approx(saved(batch=4), rel=0.05), "but for the head's gradient"
    stream = 4 * 64 * 48 * 2
    blocks = saved(recompute=True, num_layers=4) - saved(recompute=True, num_layers=3)
    assert stream <= blocks < 1.1 * stream, "a block keeps its input"


def test_the_equation_of_the_documentation():
    """docs/memory.md: what a block of the default model saves."""
    B, T, D, H, G, d, E, K, F = 2, 512, 256, 4, 2, 32, 16, 3, 96
    config = {
        "width": D,
        "attention": {"num_heads": H, "num_kv_heads": G, "head_dim": d},
        "ffn": {"kind": "moe", "num_experts": E, "top_k": K, "expert_dim": F},
    }
    _, two, three = (
        pass_memory(
            model_on_meta(ModelConfig.model_validate({**SIZES, **config, "num_layers": layers}), torch.bfloat16),
            micro_batch=B,
            sequence_length=T,
            isolate=True,
            kernels="auto",
        ).saved
        for layers in (1, 2, 3)  # the first also makes the table of rotary angles
    )
    per_token = 2 * (4 * D + 5 * H * d + 3 * G * d + 2 * K * F) + 4 * (H + E + 4 * K)
    copied_weights = 2 * D * 2 * (H + G) * d
    assert three - two == pytest.approx(B * T * per_token + copied_weights, rel=0.01)


class Inside(LiveBytes):
    """Runs our operations themselves and keeps what each held, beyond what it got and returned, that was not foretold.

    On `meta`, with kernels that do not start.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(known)
        self.errors: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tidegate":
            given = [x for x in args if isinstance(x, torch.Tensor)]
            with LiveBytes(given) as live:
                returned = tree_leaves(OPDEFS[func._schema.name]._init_fn(*args))
            returned_bytes = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in returned}.values())
            error = (live.peak - returned_bytes - inner_bytes(func, args)) / (
                returned_bytes + sum(x.nbytes for x in given)
            )
            self.errors[func._schema.name] = max(abs(error), self.errors.get(func._schema.name, 0.0))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("case", INTERPRETED)
def test_buffers_inside_of_operations_are_predicted(case, monkeypatch):
    kernel = next(x for x in vars(swiglu).values() if hasattr(x, "__getitem__") and hasattr(x, "fn"))
    monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    made: list[Inside] = []
    monkeypatch.setattr(memory, "LiveBytes", lambda known: made.append(Inside(known)) or made[-1])
    model = model_on_meta(config_of({"width": 256, "vocab_size": 5000, **INTERPRETED[case]}), torch.bfloat16)
    pass_memory(model, micro_batch=4, sequence_length=1000, isolate=True, kernels="auto")
    assert {"tidegate::linear_cross_entropy", "tidegate::gated_attention_backward"} <= set(made[0].errors)
    assert {name: error for name, error in made[0].errors.items() if error > 0.05} == {}
