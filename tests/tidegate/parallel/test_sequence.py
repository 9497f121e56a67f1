"""Sequences over several ranks: gradients and losses are those of ranks that hold whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.attention import AttentionConfig
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.gates import AttentionGate
from tidegate.model.mixers import (
    CrossAttentionConfig,
    GAMConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    GMUConfig,
    HGRN2Config,
    KDAConfig,
    ScalarGatedConfig,
    SlidingWindowConfig,
)
from tidegate.model.moe import MoEConfig
from tidegate.model.routers.fixed import RandomConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

SEQUENCES, LENGTH, VOCAB = 8, 36, 97
HEADS: dict[str, Any] = {"num_heads": 2, "key_dim": 4, "value_dim": 6}
FFN = MoEConfig(num_experts=4, top_k=2, expert_dim=16)


MIXERS: dict[str, Any] = {
    "kda": KDAConfig(**HEADS),
    "gdn": GatedDeltaNetConfig(**HEADS),
    "gla": GLAConfig(**HEADS, conv=0),
    "hgrn2": HGRN2Config(**HEADS),
    "scalar": ScalarGatedConfig(**HEADS),
    "gam": GAMConfig(slots=5),
    "near": SlidingWindowConfig(window=13),
    "unit": GMUConfig(),
    "shared": CrossAttentionConfig(),
}


def model_of(layers: str, **attention: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        width=16,
        num_layers=layers.count(",") + 1,
        attention=AttentionConfig(**{"num_heads": 4, "num_kv_heads": 4, "head_dim": 4} | attention),
        mixers={name: MIXERS[name] for name in layers.split(", ") if name in MIXERS},
        layers=layers,
        ffn=FFN,
        init_std=0.2,
    )


MODELS = {
    "attention": model_of("attention, near", softmax="learnable_sink"),
    "grouped": model_of("near, attention", num_kv_heads=2, gate=AttentionGate(kind="value")),
    "linear": model_of("kda, gdn, gla, hgrn2, scalar, gam"),
    "hybrid": model_of("kda, attention, scalar, unit, near, shared"),
}
# Experts are drawn by each token's place in its sequence and the batch.
RANDOM = FFN.model_copy(update={"router": RandomConfig()})
MODELS["random"] = MODELS["hybrid"].model_copy(update={"ffn": RANDOM})
CLOCK = Clock(1, 1, 0)


def global_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, documents and counted positions; documents that end at a rank's border, beside it, and over several."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    documents = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int32)
    for row, begins in enumerate([(), (18,), (17, 19), (9, 18, 27), (8, 10, 26), (1,), (35,), (18, 19)]):
        for begin in begins:
            documents[row, begin:] += 1
    return tokens, documents, torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.8


def of_ranks(
    layouts: list[tuple[int, int, int]], name: str, isolate: bool
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Gradients after the engine's reduction, and this rank's losses, for (sequence, expert, accumulation) each;
    activations are recomputed where M = 2."""
    return [_of_rank(*layout, MODELS[name], isolate) for layout in layouts]


def _of_rank(
    sequence: int, expert: int, accumulation: int, model: ModelConfig, isolate: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from tidegate.parallel.engine import Engine
    from tidegate.train.step import train_step

    replicas = collectives.world_size() // sequence
    engine = Engine(
        model,
        ParallelConfig(expert=expert, sequence=sequence, zero_stage=0),
        precision="fp32",
        seed=0,
        micro_batch=SEQUENCES // replicas // accumulation,
        accumulation=accumulation,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        gradient_clip=0.0,
        recompute=accumulation == 2,
    )
    inner, gradients = engine._engine, {}
    step = inner.step

    def capture_then_step(*args: Any, **kwargs: Any) -> Any:
        if inner.is_gradient_accumulation_boundary():
            gradients.update({name: p.grad.clone() for name, p in engine.model.named_parameters()})
        return step(*args, **kwargs)

    inner.step = capture_then_step
    mine = torch.arange(SEQUENCES).view(accumulation, replicas, -1)[:, collectives.rank() // sequence]
    tokens, documents, counted = global_batch()
    batch = StepBatch(tokens[mine], documents[mine], counted[mine], torch.zeros_like(mine), mine)
    weights = {} if model.ffn == RANDOM else {"loss_weight": 1.0, "z_loss_weight": 0.01}
    balance = BalanceConfig(**({"loss_weight": 0.0, "z_loss_weight": 0.0} | weights))
    balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
    result = train_step(engine, balancer, batch, CLOCK, isolate=isolate)
    losses = torch.stack(result.losses[:3])
    collectives.all_reduce(losses)
    return gradients, losses


def of_whole_sequences(config: ModelConfig, isolate: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Autograd of the global batch's loss, written out, in one plain process."""
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)
    tokens, documents, counted = global_batch()
    routings: list[Any] = []
    for block in model.blocks:
        block.ffn.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    output = model(tokens[:, :-1], tokens[:, 1:], counted, documents if isolate else None, clock=CLOCK)
    nll, kept = output.nll / counted.sum(), counted.flatten()
    balance, z = torch.zeros(()), torch.zeros(())
    for routing in routings if config.ffn != RANDOM else []:
        chosen = torch.nn.functional.one_hot(routing.experts_NS, 4).sum(1)[kept].float()
        balance = balance + 4 * (chosen.sum(0) / chosen.sum() * routing.probs_NE[kept].mean(0)).sum()
        z = z + 0.01 * routing.logits_NE[kept].logsumexp(-1).square().mean()
    (nll + balance + z).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, torch.stack([nll, balance, z]).detach()


def assert_whole(results: list[Any], layouts: list[tuple[int, int, int]], name: str, isolate: bool) -> None:
    truth, expected = of_whole_sequences(MODELS[name], isolate)
    length = torch.stack([gradient.norm() for gradient in truth.values()]).norm()
    for rank, found in enumerate(results):
        for layout, (gradients, losses) in zip(layouts, found, strict=True):
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6, msg=lambda m, at=layout: f"{at}: {m}")
            assert gradients.keys() == truth.keys()
            for parameter, gradient in gradients.items():
                whole = truth[parameter]
                if len(gradient) != len(whole):  # this rank's experts
                    whole = whole.split(len(gradient))[rank % (len(whole) // len(gradient))]
                # A few units in the last place; of the whole gradient where sums of a few numbers cancel.
                error, allowed = (gradient - whole).norm(), 2e-5 * whole.norm() + 1e-7 * length
                assert error < allowed, (layout, rank, parameter, float(error / whole.norm()))


@pytest.mark.parametrize("isolate", [True, False], ids=["isolated", "joined"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_of_a_sequence_have_the_gradients_of_one(on_ranks: Any, name: str, isolate: bool) -> None:
    """Counts, balance and loss are of all tokens."""
    layouts = [(2, 1, 1), (2, 2, 2)]
    assert_whole(on_ranks(2, of_ranks, layouts, name, isolate), layouts, name, isolate)


@pytest.mark.parametrize("name", ["attention", "hybrid"])
def test_four_ranks(on_ranks: Any, name: str) -> None:
    """As one sequence, and as two beside each other."""
    layouts = [(4, 1, 1), (4, 2, 2), (2, 4, 2), (2, 2, 1)]
    assert_whole(on_ranks(4, of_ranks, layouts, name, True), layouts, name, True)


def metrics_of_a_run(path: str, scratch: str, checkpoints: str, steps: int, *overrides: str) -> dict[Any, float]:
    """Of every step that this call trained, by step and name; it is asked to stop after so many."""
    from pathlib import Path

    from tidegate.config import load
    from tidegate.data import prepare
    from tidegate.train.job import Job
    from tidegate.train.loop import World, train

    job = load(path, Job, overrides).config
    folder = prepare(job.data, cache_dir=Path(scratch) / "data", job_dir=Path(path).parent)
    found: dict[Any, float] = {}
    asked = iter(range(1, 1000))

    def record(record: Any) -> None:
        found.update({(record.step, name): value for name, value in record.metrics.items()})

    train(job, World(folder, f"{scratch}/{checkpoints}", record, print, lambda: next(asked) >= steps))
    return found


def test_a_run_of_shared_sequences_is_that_of_whole_ones_and_goes_on_as_such(
    tiny_job: Any, on_ranks: Any, tmp_path: Any
) -> None:
    """Real text, held-out losses, and a checkpoint that ranks with whole sequences continue from."""
    layers = {
        "layers": "kda, attention",
        "mixers": {"kda": {"kind": "kda", "num_heads": 2, "key_dim": 8, "value_dim": 8}},
    }
    path = str(tiny_job(model=layers, train={"eval_every": 4}, resources={"workers": 2}))
    alone, shared = ("resources.workers=1",), ("parallel.sequence=2", "parallel.expert=2")
    (whole,) = on_ranks(1, metrics_of_a_run, path, str(tmp_path), "whole", 99, *alone)
    (begun, _) = on_ranks(2, metrics_of_a_run, path, str(tmp_path), "shared", 7, *shared)
    (ended, _) = on_ranks(2, metrics_of_a_run, path, str(tmp_path), "shared", 99, "parallel.expert=2")
    assert {step for step, _ in begun} == set(range(1, 8))
    assert {step for step, _ in ended} == set(range(8, 13))
    names = "train/loss", "val/", "moe/", "balance/"
    compared = [key for key in whole if key[1].startswith(names) and not key[1].endswith("lbl_covariance")]  # of cuts
    assert {"train/loss", "val/loss", "val/digits/loss", "moe/0/maxvio"} <= {name for _, name in compared}
    for key in compared:
        assert (begun | ended)[key] == pytest.approx(whole[key], rel=2e-4, abs=1e-4), key
    assert (12, "attention/1/entropy") in ended
    assert not any(name.startswith("attention/") for _, name in begun), "no rank sees all keys of its queries"
