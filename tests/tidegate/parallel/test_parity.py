"""The promise: gradients and losses do not depend on how a global batch is cut into ranks and micro-batches.

Everything runs in real gloo processes under the real DeepSpeed engine. The truth of the gradients is one plain
process without engine that sees the whole batch; the truth of training is the engine at world size 1.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.attention import AttentionConfig
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.moe import MoEConfig, SharedExpertsConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

SEQUENCES, LENGTH, VOCAB = 16, 33, 97
MODEL = ModelConfig(
    vocab_size=VOCAB,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=MoEConfig(num_experts=8, top_k=3, expert_dim=24, shared=SharedExpertsConfig(num=1, gate=True)),
    init_std=0.1,
)
EXACT = BalanceConfig(loss_weight=1.0, z_loss_weight=0.01)


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, documents and counted positions of a step; sequences hold unequal numbers of counted tokens."""
    generator = torch.Generator().manual_seed(step)
    # Sequence q draws from its own part of the vocabulary, so that micro-batches route differently.
    low = torch.arange(SEQUENCES)[:, None] * 5
    tokens = low + torch.randint(0, 20, (SEQUENCES, LENGTH + 1), generator=generator)
    documents = torch.arange(LENGTH).div(11, rounding_mode="floor").to(torch.int32).expand(SEQUENCES, -1)
    counted = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.linspace(0.2, 1.0, SEQUENCES)[:, None]
    return tokens, documents, counted


def part_of(step: int, accumulation: int) -> StepBatch:
    """This rank's part, cut as the loader cuts it."""
    shape = (accumulation, collectives.world_size(), -1)
    mine = torch.arange(SEQUENCES).view(shape)[:, collectives.rank()]
    tokens, documents, counted = global_batch(step)
    return StepBatch(tokens[mine], documents[mine], counted[mine], torch.zeros_like(mine))


def engine_for(
    parallel: ParallelConfig,
    accumulation: int,
    precision: Any = "fp32",
    clip: float = 0.0,
    recompute: bool = False,
    weight_decay: float = 0.1,
) -> Any:
    from tidegate.parallel.engine import Engine

    return Engine(
        MODEL,
        parallel,
        precision=precision,
        seed=0,
        micro_batch=max(1, SEQUENCES // collectives.world_size() // accumulation),
        accumulation=accumulation,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=weight_decay,
        gradient_clip=clip,
        recompute=recompute,
    )


def reduced_gradients(balance: BalanceConfig, accumulation: int, expert: int) -> dict[str, torch.Tensor]:
    """Gradients after the engine's reduction, of one step; activations are recomputed where M = 2."""
    from tidegate.train.step import train_step

    engine = engine_for(ParallelConfig(expert=expert, zero_stage=0), accumulation, recompute=accumulation == 2)
    inner, gradients = engine._engine, {}
    step = inner.step

    def capture_then_step(*args: Any, **kwargs: Any) -> Any:
        if inner.is_gradient_accumulation_boundary():
            gradients.update({name: p.grad.clone() for name, p in engine.model.named_parameters()})
        return step(*args, **kwargs)

    inner.step = capture_then_step
    balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
    train_step(engine, balancer, part_of(0, accumulation), isolate=True)
    return gradients


def gradients_at(cuts: list[tuple[int, int]], balance: BalanceConfig) -> list[dict[str, torch.Tensor]]:
    return [reduced_gradients(balance, accumulation, expert) for accumulation, expert in cuts]


def exact_gradients(balance: BalanceConfig) -> dict[str, torch.Tensor]:
    """Autograd of the global batch's loss, written out from its definition, in one plain process."""
    model = materialize(lambda: Decoder(MODEL), torch.device("cpu"), seed=0)
    tokens, documents, counted = global_batch(0)
    routings: list[Any] = []
    for block in model.blocks:
        block.ffn.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    nll = model(tokens[:, :-1], tokens[:, 1:], counted, documents).nll_B.sum()
    loss = nll / counted.sum()
    kept = counted.flatten()
    for routing in routings:
        num_experts = routing.probs_NE.shape[1]
        chosen = torch.nn.functional.one_hot(routing.experts_NK, num_experts).sum(1)[kept].float()
        fractions = chosen.sum(0) / chosen.sum()
        loss = loss + balance.loss_weight * num_experts * (fractions * routing.probs_NE[kept].mean(0)).sum()
        loss = loss + balance.z_loss_weight * routing.logits_NE[kept].logsumexp(-1).square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


# fp32 sums in another order: a few units in the last place (6e-8) times the square root of some hundred terms.
GRADIENT_TOLERANCE = 2e-5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_of_a_global_batch_are_those_of_one_process(on_ranks: Any, world_size: int) -> None:
    truth = exact_gradients(EXACT)
    cuts = [(accumulation, expert) for accumulation in (1, 2, 4) for expert in sorted({1, min(2, world_size)})]
    for results in zip(*on_ranks(world_size, gradients_at, cuts, EXACT), strict=True):
        for rank, gradients in enumerate(results):
            assert gradients.keys() == truth.keys()
            for name, gradient in gradients.items():
                expected = truth[name]
                if gradient.shape != expected.shape:  # this rank's experts
                    num = gradient.shape[0]
                    first = rank % (expected.shape[0] // num) * num
                    expected = expected[first : first + num]
                assert relative_error(gradient, expected) < GRADIENT_TOLERANCE, (name, rank)


def test_running_counts_are_exact_without_accumulation_and_differ_with_it(on_ranks: Any) -> None:
    running = EXACT.model_copy(update={"counts": "running"})
    truth = exact_gradients(running)["blocks.0.ffn.router.weight"]
    (without, with_accumulation), _ = on_ranks(2, gradients_at, [(1, 1), (4, 1)], running)
    assert relative_error(without["blocks.0.ffn.router.weight"], truth) < GRADIENT_TOLERANCE
    assert relative_error(with_accumulation["blocks.0.ffn.router.weight"], truth) > 100 * GRADIENT_TOLERANCE


Layout = tuple[int, int, int]  # expert, ZeRO stage, accumulation


def train_losses(layouts: list[Layout], precision: str) -> list[list[list[float]]]:
    """Per layout and step: losses summed over ranks, and the gradient norm; clipping is active."""
    from tidegate.train.step import train_step, update_biases

    runs = []
    for expert, zero_stage, accumulation in layouts:
        engine = engine_for(ParallelConfig(expert=expert, zero_stage=zero_stage), accumulation, precision, clip=0.3)
        balance = BalanceConfig(loss_weight=0.1, bias_rate=0.01)
        balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
        steps = []
        for step in range(5):
            engine.set_learning_rate(1e-2)
            result = train_step(engine, balancer, part_of(step, accumulation), isolate=True)
            losses = torch.stack(result.losses)
            update_biases(engine.model, balancer.step_counts(), balance.bias_rate)
            collectives.all_reduce(losses)
            steps.append([*losses.tolist(), engine.gradient_norm()])
        runs.append(steps)
    return runs


LAYOUTS: dict[int, list[Layout]] = {
    1: [(1, 1, 1), (1, 0, 1), (1, 2, 4)],
    2: [(2, 1, 1), (2, 0, 2), (2, 2, 2), (1, 1, 2), (1, 0, 1)],
    4: [(2, 1, 1), (2, 2, 2), (2, 0, 1), (4, 1, 1), (1, 1, 4)],
}


@pytest.mark.parametrize("world_size", [2, 4])
def test_expert_parallel_training_has_the_losses_of_one_process(on_ranks: Any, world_size: int) -> None:
    """fp32: losses of five clipped AdamW steps agree to 1e-5; Adam's division by small moments magnifies 1e-7."""
    (alone,) = on_ranks(1, train_losses, LAYOUTS[1], "fp32")
    for run in alone[1:]:
        torch.testing.assert_close(torch.tensor(run), torch.tensor(alone[0]), rtol=1e-5, atol=1e-6)
    results = on_ranks(world_size, train_losses, LAYOUTS[world_size], "fp32")
    for layout, *ranks in zip(LAYOUTS[world_size], *results, strict=True):
        for rank in ranks:
            torch.testing.assert_close(
                torch.tensor(rank), torch.tensor(alone[0]), rtol=1e-5, atol=1e-6, msg=lambda m, at=layout: f"{at}: {m}"
            )


def test_bf16_expert_parallel_training_stays_near_fp32(on_ranks: Any) -> None:
    """bf16 weights round to 3 digits: losses within 1 % of fp32, on every ZeRO stage."""
    layouts = [(2, 1, 2), (2, 2, 2), (2, 0, 1)]
    (alone,) = on_ranks(1, train_losses, [(1, 1, 1)], "fp32")
    (half, _) = on_ranks(2, train_losses, layouts, "bf16")
    for layout, run in zip(layouts, half, strict=True):
        nll, truth = torch.tensor(run)[:, 0], torch.tensor(alone[0])[:, 0]
        torch.testing.assert_close(nll, truth, rtol=1e-2, atol=0, msg=lambda m, at=layout: f"{at}: {m}")


def initial_weights(expert: int) -> dict[str, torch.Tensor]:
    engine = engine_for(ParallelConfig(expert=expert, zero_stage=1), 1)
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def test_initial_weights_do_not_depend_on_the_layout(on_ranks: Any) -> None:
    plain = materialize(lambda: Decoder(MODEL), torch.device("cpu"), seed=0)
    ranks = on_ranks(2, initial_weights, 2)
    for name, expected in plain.named_parameters():
        parts = [rank[name] for rank in ranks]
        whole = parts[0] if parts[0].shape == expected.shape else torch.cat(parts)
        assert torch.equal(whole, expected), name


def all_dead_but_one() -> float:
    """Route everything to expert 0: the other rank's experts get no rows, and no gradient but zero."""
    from tidegate.train.step import train_step

    engine = engine_for(ParallelConfig(expert=2, zero_stage=0), 1)
    for block in engine.model.blocks:
        block.ffn.router.expert_bias[:3] = 1000.0
    balancer = Balancer(EXACT, collectives.all_reduce, collectives.world_size(), 1)
    return float(train_step(engine, balancer, part_of(0, 1), isolate=True).losses.nll)


def test_a_rank_whose_experts_get_no_rows_takes_part(on_ranks: Callable[..., list[float]]) -> None:
    assert all(torch.isfinite(torch.tensor(loss)) for loss in on_ranks(2, all_dead_but_one))


def continue_from_checkpoint(
    folder: str, layouts: list[Layout], precision: str
) -> list[tuple[list[float], list[float]]]:
    """Per layout: losses of steps 3 and 4 straight through, and from a checkpoint taken after step 2."""
    from tidegate.train.step import train_step, update_biases

    def steps(engine: Any, accumulation: int, which: range) -> list[float]:
        balance = BalanceConfig(bias_rate=0.01)
        balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
        losses = []
        for step in which:
            engine.set_learning_rate(1e-2)
            result = train_step(engine, balancer, part_of(step, accumulation), isolate=True)
            update_biases(engine.model, balancer.step_counts(), balance.bias_rate)
            losses += [*torch.stack(result.losses).tolist(), engine.gradient_norm()]
        return losses

    runs = []
    for number, (expert, zero_stage, accumulation) in enumerate(layouts):
        parallel = ParallelConfig(expert=expert, zero_stage=zero_stage)
        # Each rank writes to a folder of its own, as on Ray; the folders are merged before loading.
        own, merged = Path(folder) / f"{number}-rank{collectives.rank()}", Path(folder) / f"{number}-merged"
        engine = engine_for(parallel, accumulation, precision, clip=0.3)
        steps(engine, accumulation, range(3))
        engine.save(own, {"step": 3})
        straight = steps(engine, accumulation, range(3, 5))
        shutil.copytree(own, merged, dirs_exist_ok=True)
        torch.distributed.barrier()
        resumed = engine_for(parallel, accumulation, precision, clip=0.3, weight_decay=0.1)
        assert resumed.load(merged) == {"step": 3}
        runs.append((straight, steps(resumed, accumulation, range(3, 5))))
    return runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_continues_bitwise_at_every_zero_stage(on_ranks: Any, tmp_path: Path, precision: str) -> None:
    layouts = [(2, 1, 1), (2, 2, 2), (2, 0, 1)]
    for rank in on_ranks(4, continue_from_checkpoint, str(tmp_path), layouts, precision):
        for layout, (straight, resumed) in zip(layouts, rank, strict=True):
            assert resumed == straight, layout


def settings_after_load(folder: str) -> list[tuple[float, float]]:
    found = []
    for zero_stage in (0, 1, 2):
        parallel = ParallelConfig(zero_stage=zero_stage)
        engine_for(parallel, 1, clip=0.3).save(Path(folder) / str(zero_stage), {})
        engine = engine_for(parallel, 1, clip=9.0, weight_decay=0.5)
        engine.load(Path(folder) / str(zero_stage))
        inner = engine._engine.optimizer
        decay = max(group["weight_decay"] for group in inner.param_groups)
        found.append((decay, engine._clip if zero_stage == 0 else inner.clip_grad))
    return found


def test_a_resumed_job_keeps_its_own_optimizer_settings(on_ranks: Any, tmp_path: Path) -> None:
    assert on_ranks(1, settings_after_load, str(tmp_path)) == [[(0.5, 9.0)] * 3]


def norms_of_repeated_micro_batches(repeats: list[int], zero_stage: int) -> list[float]:
    """Gradient norm in bf16 of one sequence, taken that many times as a step's micro-batches."""
    from tidegate.train.step import train_step

    norms = []
    for accumulation in repeats:
        engine = engine_for(ParallelConfig(zero_stage=zero_stage), accumulation, "bf16")
        balancer = Balancer(BalanceConfig(scope="micro_batch"), collectives.all_reduce, 1, accumulation)
        tokens, documents, counted = (t[:1].expand(accumulation, 1, -1) for t in global_batch(0))
        batch = StepBatch(tokens, documents, counted, torch.zeros(accumulation, 1, dtype=torch.int64))
        train_step(engine, balancer, batch, isolate=True)
        norms.append(engine.gradient_norm())
    return norms


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_bf16_gradients_are_summed_in_fp32(on_ranks: Any, zero_stage: int) -> None:
    """128 equal micro-batches have the gradient of one; sums in bf16 would be off by several tenths of a percent."""
    ((once, often),) = on_ranks(1, norms_of_repeated_micro_batches, [1, 128], zero_stage)
    assert often == pytest.approx(once, rel=1e-4)
