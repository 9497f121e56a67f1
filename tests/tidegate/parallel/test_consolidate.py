"""Checkpoints of real engines at many layouts hold one model, which is put together on one process."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from tidegate.config import ConfigError
from tidegate.model.clock import Clock
from tidegate.model.decoder import ModelConfig
from tidegate.model.initialisation import Draw
from tidegate.model.moe import Experts
from tidegate.model.weights import ALL, Spec, Weights, num_parameters, specs_of
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "width": 32,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "init_std": 0.1,
}
MOE = {"kind": "moe", "num_experts": 6, "top_k": 2, "expert_dim": 24, "shared": {"num": 1}}


def model_of(**ffn: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "ffn": {**MOE, **ffn}})


PLAIN, RELU2, POLY = model_of(), model_of(activation="relu2"), model_of(activation="poly_norm")
UNEVEN = model_of(num_experts=3, sizes=[{"num": 1, "times": 0}, {"num": 1, "times": 1}, {"num": 1, "times": 3}])
ONE_ROUTER = model_of(router={"kind": "decoupled"})

Case = tuple[ModelConfig, str, int, int, str]  # model, precision, expert, ZeRO stage, offload
CASES: dict[str, Case] = {
    "EP 2, ZeRO 1": (PLAIN, "bf16", 2, 1, "none"),
    "EP 2, ZeRO 2, fp32": (PLAIN, "fp32", 2, 2, "none"),
    "EP 2, no ZeRO": (RELU2, "bf16", 2, 0, "none"),
    "DP 2": (POLY, "bf16", 1, 1, "none"),
    "uneven experts": (UNEVEN, "bf16", 2, 1, "none"),
    "one router": (ONE_ROUTER, "fp32", 2, 1, "none"),
    "experts on the host, EP 2": (PLAIN, "bf16", 2, 1, "experts"),
    "experts on the host, DP 2": (RELU2, "bf16", 1, 1, "experts"),
}


def engine_after_a_step(case: Case, learning_rate: float, weights: Weights | None = None) -> Any:
    from tidegate.parallel.engine import Engine

    model, precision, expert, stage, offload = case
    parallel: Any = {"expert": expert, "zero_stage": stage, "offload": offload}
    settings: Any = {"precision": precision, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    engine = Engine(
        model,
        ParallelConfig(**parallel),
        seed=0,
        micro_batch=1,
        accumulation=1,
        gradient_clip=1.0,
        recompute=False,
        weights=weights,
        **settings,
    )
    engine.set_learning_rate(learning_rate)
    tokens = torch.randint(0, 97, (1, 17), generator=torch.Generator().manual_seed(collectives.rank()))
    counted = torch.ones(1, 16, dtype=torch.bool)
    output = engine.forward(tokens[:, :-1], tokens[:, 1:], counted, clock=Clock(1, 16, seed=0))
    engine.backward(output.nll / counted.numel())
    engine.step()
    return engine


def saved(cases: list[Case]) -> list[tuple[dict[str, bytes], dict[str, torch.Tensor]]]:
    """Per case, after a step: this rank's files, and the weights that it uses."""
    found = []
    for case in cases:
        engine = engine_after_a_step(case, 1e-2)
        files: dict[str, bytes] = {}

        def put(name: str, content: Any, files: dict[str, bytes] = files) -> None:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            files[name] = buffer.getvalue()

        engine.save(put, {"step": 1})
        found.append((files, in_use(engine)))
    return found


def in_use(engine: Any) -> dict[str, torch.Tensor]:
    weights = {name: tensor.detach().clone() for name, tensor in engine.model.state_dict().items()}
    for path, module in engine.model.named_modules():
        if isinstance(module, Experts) and engine.store is not None:
            with torch.no_grad(), module.lent(keeps=False):  # type: ignore[operator]
                names = [name for name in ("w1", "w2", "w3") if f"{path}.{name}" in specs_of(engine.model.config)]
                weights |= {f"{path}.{name}": getattr(module, name).detach().clone() for name in names}
    return weights


def opened(files: dict[str, bytes], case: Case) -> Any:
    from tidegate.parallel.consolidate import CheckpointWeights

    model, _, expert, _, offload = case
    layout = {"resources.workers": 2, "parallel.expert": expert, "parallel.offload": offload}
    return CheckpointWeights(lambda name: io.BytesIO(files[name]), files, model, layout)


@pytest.mark.slow
def test_any_layout_holds_the_weights_in_use(on_ranks: Any) -> None:
    first, second = on_ranks(2, saved, list(CASES.values()))
    for (name, case), (files, mine), (more, others) in zip(CASES.items(), first, second, strict=True):
        model, precision, expert, _, _ = case
        weights = opened(files | more, case)
        assert num_parameters(weights.specs) == num_parameters(specs_of(model)), name
        for tensor, spec in weights.specs.items():
            spread = ".experts.w" in tensor and expert > 1
            wanted = torch.cat([mine[tensor], others[tensor]]) if spread else mine[tensor]
            read = weights.read(tensor)
            assert torch.equal(read, wanted), (name, tensor)
            assert read.dtype == spec.dtype, (name, tensor)
            if spread:
                assert torch.equal(weights.read(tensor, slice(2, 4)), wanted[2:4]), (name, tensor)
        assert weights.specs["head.weight"].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)

    names = list(CASES)
    files = first[names.index("EP 2, ZeRO 1")][0] | second[names.index("EP 2, ZeRO 1")][0]
    host, host_more = (ranks[names.index("experts on the host, DP 2")][0] for ranks in (first, second))
    missing_files_are_named(files, host | host_more)


def missing_files_are_named(files: dict[str, bytes], host: dict[str, bytes]) -> None:
    case, lost = CASES["EP 2, ZeRO 1"], "state/layer_1_expert_4_mp_rank_00_model_states.pt"
    with pytest.raises(ConfigError, match=f"^{lost}: missing from the checkpoint"):
        opened({name: content for name, content in files.items() if name != lost}, case)
    with pytest.raises(ConfigError, match=r"^state/mp_rank_00_model_states.pt: missing"):
        opened({name: content for name, content in files.items() if "expert" in name}, case)
    with pytest.raises(ConfigError, match=r"experts_rank_00001_layer_000.pt and 1 more files: missing"):
        opened({n: c for n, c in host.items() if "rank_00001_layer" not in n}, CASES["experts on the host, DP 2"])
    # An expert's file in another's place.
    small = io.BytesIO()
    torch.save({"blocks.1.ffn.experts.w1.0": torch.zeros(3, 3)}, small)
    weights = opened({**files, lost: small.getvalue()}, case)
    with pytest.raises(ConfigError, match=f"^{lost}: w1 is .3, 3., not .24, 32.: the file is not of this model"):
        weights.read("blocks.1.ffn.experts.w1")
    # The checkpoint of another model.
    other = case[0].model_copy(update={"num_layers": 1})
    with pytest.raises(ConfigError, match=r"mp_rank_00_model_states.pt: blocks.1.* is not known"):
        opened(files, (other, *case[1:]))


class Drawn(Weights):
    """Values that are functions of names."""

    def __init__(self, model: ModelConfig) -> None:
        self._specs = specs_of(model)

    @property
    def specs(self) -> dict[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        tensor = torch.empty(self._specs[name].shape)
        Draw(5, name).normal_(tensor, 0.3, "weight")
        return tensor.to(torch.bfloat16)[rows if rows != ALL else ...]


def after_a_step_that_moves_nothing(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """The weights in use that the optimizer makes of its own copy of them."""
    return [in_use(engine_after_a_step(case, 0.0, Drawn(case[0]))) for case in cases]


@pytest.mark.slow
def test_an_engine_and_its_optimizer_begin_with_given_weights(on_ranks: Any) -> None:
    names = ("EP 2, ZeRO 1", "EP 2, no ZeRO", "one router", "experts on the host, EP 2")
    cases = {name: CASES[name] for name in names}
    first, second = on_ranks(2, after_a_step_that_moves_nothing, list(cases.values()))
    for (name, case), mine, others in zip(cases.items(), first, second, strict=True):
        weights = Drawn(case[0])
        for tensor, spec in weights.specs.items():
            spread = ".experts.w" in tensor and case[2] > 1
            found = torch.cat([mine[tensor], others[tensor]]) if spread else mine[tensor]
            assert torch.equal(found.float(), weights.read(tensor).float()), (name, tensor, spec)
