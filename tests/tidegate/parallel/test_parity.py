"""The promise: gradients and losses do not depend on how a global batch is cut into ranks and micro-batches.

Everything runs in real gloo processes under the real DeepSpeed engine. The truth of the gradients is one plain
process without engine that sees the whole batch; the truth of training is the engine at world size 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.attention import AttentionConfig
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, DenseConfig, ModelConfig, materialize
from tidegate.model.moe import MoEConfig, SharedExpertsConfig
from tidegate.model.norms import GatedNormConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig
from tidegate_kernels.choice import Kernels, chosen

SEQUENCES, LENGTH, VOCAB = 16, 33, 97
MODEL = ModelConfig(
    vocab_size=VOCAB,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=MoEConfig(num_experts=8, top_k=3, expert_dim=24, shared=SharedExpertsConfig(num=1, gate=True)),
    init_std=0.1,
)
# A third expert tensor that is not a matrix, vectors outside of norms, matrices inside of them.
UNUSUAL = ModelConfig(
    vocab_size=VOCAB,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, softmax="learnable_sink"),
    ffn=MoEConfig(num_experts=8, top_k=3, expert_dim=24, activation="poly_norm", shared=SharedExpertsConfig(num=1)),
    norm=GatedNormConfig(rank=4),
    init_std=0.1,
)
RELU2 = MODEL.model_copy(update={"ffn": MODEL.ffn.model_copy(update={"activation": "relu2"})})
DENSE = MODEL.model_copy(update={"ffn": DenseConfig(hidden_dim=48)})
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
    return StepBatch(tokens[mine], documents[mine], counted[mine], torch.zeros_like(mine), mine)


def clock_at(step: int) -> Clock:
    return Clock(step + 1, (step + 1) * SEQUENCES * LENGTH, seed=0)


def engine_for(
    parallel: ParallelConfig,
    accumulation: int,
    precision: Any = "fp32",
    clip: float = 0.0,
    recompute: bool = False,
    weight_decay: float = 0.1,
    model: ModelConfig = MODEL,
    optimizer_state: Any = "fp32",
) -> Any:
    from tidegate.parallel.engine import Engine

    return Engine(
        model,
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
        optimizer_state=optimizer_state,
    )


def reduced_gradients(
    balance: BalanceConfig, accumulation: int, expert: int, model: ModelConfig = MODEL, all_to_all: Any = "plain"
) -> dict[str, torch.Tensor]:
    """Gradients after the engine's reduction, of one step; activations are recomputed where M = 2."""
    from tidegate.train.step import train_step

    parallel = ParallelConfig(expert=expert, zero_stage=0, all_to_all=all_to_all)
    engine = engine_for(parallel, accumulation, recompute=accumulation == 2, model=model)
    inner, gradients = engine._engine, {}
    step = inner.step

    def capture_then_step(*args: Any, **kwargs: Any) -> Any:
        if inner.is_gradient_accumulation_boundary():
            gradients.update({name: p.grad.clone() for name, p in engine.model.named_parameters()})
        return step(*args, **kwargs)

    inner.step = capture_then_step
    balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
    train_step(engine, balancer, part_of(0, accumulation), Clock(1, 1, 0), isolate=True)
    return gradients


def gradients_at(
    cuts: list[tuple[int, int]], balance: BalanceConfig, model: ModelConfig = MODEL, kernels: Kernels = "auto"
) -> list[dict[str, torch.Tensor]]:
    with chosen(kernels):
        return [reduced_gradients(balance, accumulation, expert, model) for accumulation, expert in cuts]


def exact_gradients(balance: BalanceConfig, config: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """Autograd of the global batch's loss, written out from its definition, in one plain process."""
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)
    tokens, documents, counted = global_batch(0)
    routings: list[Any] = []
    for block in model.blocks:
        block.ffn.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    nll = model(tokens[:, :-1], tokens[:, 1:], counted, documents).nll
    loss = nll / counted.sum()
    kept = counted.flatten()
    for routing in routings:
        num_experts = routing.probs_NE.shape[1]
        chosen = torch.nn.functional.one_hot(routing.experts_NS, num_experts).sum(1)[kept].float()
        fractions = chosen.sum(0) / chosen.sum()
        loss = loss + balance.loss_weight * num_experts * (fractions * routing.probs_NE[kept].mean(0)).sum()
        loss = loss + balance.z_loss_weight * routing.logits_NE[kept].logsumexp(-1).square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


# fp32 sums in another order: a few units in the last place (6e-8) times the square root of some hundred terms.
GRADIENT_TOLERANCE = 2e-5


@pytest.mark.parametrize(("world_size", "model"), [(1, MODEL), (2, MODEL), (4, MODEL), (2, UNUSUAL)])
def test_gradients_of_a_global_batch_are_those_of_one_process(
    on_ranks: Any, world_size: int, model: ModelConfig
) -> None:
    cuts = [(accumulation, expert) for accumulation in (1, 2, 4) for expert in sorted({1, min(2, world_size)})]
    assert_exact(on_ranks(world_size, gradients_at, cuts, EXACT, model), exact_gradients(EXACT, model))


@pytest.mark.parametrize("model", [MODEL, pytest.param(UNUSUAL, marks=pytest.mark.long)])
def test_triton_kernels_have_the_same_gradients(on_ranks: Any, model: ModelConfig) -> None:
    """In the interpreter, with experts spread over two ranks and activations recomputed."""
    assert_exact(on_ranks(2, gradients_at, [(2, 2)], EXACT, model, "triton"), exact_gradients(EXACT, model))


def assert_exact(by_rank: list[list[dict[str, torch.Tensor]]], truth: dict[str, torch.Tensor]) -> None:
    for results in zip(*by_rank, strict=True):
        for rank, gradients in enumerate(results):
            assert gradients.keys() == truth.keys()
            for name, gradient in gradients.items():
                expected = truth[name]
                if gradient.shape != expected.shape:  # this rank's experts
                    num = gradient.shape[0]
                    first = rank % (expected.shape[0] // num) * num
                    expected = expected[first : first + num]
                assert relative_error(gradient, expected) < GRADIENT_TOLERANCE, (name, rank)


def gradients_by_all_to_all() -> list[dict[str, torch.Tensor]]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return [reduced_gradients(EXACT, 2, 4, all_to_all=kind) for kind in ("plain", "hierarchical")]


def test_rows_that_travel_by_node_train_to_the_same_bits(on_ranks: Any) -> None:
    """Two simulated nodes of two ranks; activations are recomputed."""
    for plain, by_node in on_ranks(4, gradients_by_all_to_all):
        assert all(torch.equal(gradient, by_node[name]) for name, gradient in plain.items())


def test_running_counts_are_exact_without_accumulation_and_differ_with_it(on_ranks: Any) -> None:
    running = EXACT.model_copy(update={"counts": "running"})
    truth = exact_gradients(running)["blocks.0.ffn.router.weight"]
    (without, with_accumulation), _ = on_ranks(2, gradients_at, [(1, 1), (4, 1)], running)
    assert relative_error(without["blocks.0.ffn.router.weight"], truth) < GRADIENT_TOLERANCE
    assert relative_error(with_accumulation["blocks.0.ffn.router.weight"], truth) > 100 * GRADIENT_TOLERANCE


Layout = tuple[int, int, int]  # expert, ZeRO stage, accumulation


def train_losses(
    layouts: list[Layout], precision: str, model: ModelConfig = MODEL, offload: Any = "none", state: Any = "fp32"
) -> list[list[list[float]]]:
    """Per layout and step: losses summed over ranks, and the gradient norm; clipping is active."""
    from tidegate.train.step import train_step, update_routers

    runs = []
    for expert, zero_stage, accumulation in layouts:
        parallel = ParallelConfig(expert=expert, zero_stage=zero_stage, offload=offload)
        engine = engine_for(parallel, accumulation, precision, clip=0.3, model=model, optimizer_state=state)
        balance = BalanceConfig(loss_weight=0.1, bias_rate=0.01)
        balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
        steps = []
        for step in range(5):
            engine.set_learning_rate(1e-2)
            result = train_step(engine, balancer, part_of(step, accumulation), clock_at(step), isolate=True)
            losses = torch.stack(result.losses[:3])
            update_routers(engine.model, balancer, clock_at(step), balance.bias_rate)
            collectives.all_reduce(losses)
            steps.append([*losses.tolist(), float(engine.gradient_norm())])
        runs.append(steps)
    return runs


LAYOUTS: dict[int, list[Layout]] = {
    1: [(1, 1, 1), (1, 0, 1), (1, 2, 4)],
    2: [(2, 1, 1), (2, 0, 2), (2, 2, 2), (1, 1, 2), (1, 0, 1)],
    4: [(2, 1, 1), (2, 2, 2), (2, 0, 1), (4, 1, 1), (1, 1, 4)],
}


@pytest.mark.parametrize(("world_size", "model"), [(2, MODEL), (4, MODEL), (2, UNUSUAL)])
def test_expert_parallel_training_has_the_losses_of_one_process(
    on_ranks: Any, world_size: int, model: ModelConfig
) -> None:
    """fp32: losses of five clipped AdamW steps agree to 1e-5; Adam's division by small moments magnifies 1e-7."""
    (alone,) = on_ranks(1, train_losses, LAYOUTS[1], "fp32", model)
    for run in alone[1:]:
        torch.testing.assert_close(torch.tensor(run), torch.tensor(alone[0]), rtol=1e-5, atol=1e-6)
    results = on_ranks(world_size, train_losses, LAYOUTS[world_size], "fp32", model)
    for layout, *ranks in zip(LAYOUTS[world_size], *results, strict=True):
        for rank in ranks:
            torch.testing.assert_close(
                torch.tensor(rank), torch.tensor(alone[0]), rtol=1e-5, atol=1e-6, msg=lambda m, at=layout: f"{at}: {m}"
            )


# --- routers beside top-k

STEP_TOKENS = SEQUENCES * LENGTH
ROUTERS: dict[str, dict[str, Any]] = {
    "relu": {"router": {"kind": "relu", "l1_start": 0.01}},
    "top_p": {"router": {"kind": "top_p", "entropy_weight": 0.1}},
    "expert_threshold": {"router": {"kind": "expert_threshold"}},
    "quantile": {"router": {"kind": "sigmoid_top_k", "quantile": {}}},
    "hash": {"router": {"kind": "hash", "by": "bigram"}},
    "thor": {"router": {"kind": "thor"}},
    "random": {"router": {"kind": "random"}},
    # Two steps of three anneal, and two search the order of experts.
    "dense_to_sparse": {"router": {"kind": "dense_to_sparse", "anneal_tokens": 3 * STEP_TOKENS, "cutoff": 0.05}},
    "comet": {"router": {"kind": "comet", "search": {"tokens": 3 * STEP_TOKENS}}},
    "dselect_k": {"router": {"kind": "dselect_k"}},
    "decoupled": {"router": {"kind": "decoupled", "width": 16, "num_heads": 2}},
    "pre_gated": {"router": {"kind": "softmax_top_k", "reads": "previous_block"}},
    "uneven": {
        "sizes": [{"num": 1, "times": 0}, {"num": 5, "times": 1}, {"num": 1, "times": 3}, {"num": 1, "times": 2}],
        "router": {"kind": "softmax_top_k"},
    },
    "uneven_ragged": {
        "sizes": [{"num": 2, "times": 0}, {"num": 4, "times": 1}, {"num": 2, "times": 2}],
        "router": {"kind": "relu", "l1_start": 0.01},
    },
    "noise": {"router": {"kind": "sinkhorn", "probability": 0.0, "noise": 0.5}},
    "sinkhorn": {"router": {"kind": "sinkhorn", "probability": 1.0, "plan_over": "expert_group"}},
}


def model_with(router: str) -> ModelConfig:
    ffn = {"num_experts": 8, "top_k": 3, "expert_dim": 24, "shared": {"num": 1}} | ROUTERS[router]
    return MODEL.model_copy(update={"ffn": MoEConfig.model_validate(ffn)})


RouterRuns = tuple[dict[tuple[str, Layout], list[list[float]]], dict[str, torch.Tensor]]


def router_runs(layouts: list[Layout], sinkhorn: Layout) -> RouterRuns:
    """Per router, layout and step: all losses summed over ranks, and the gradient norm. And Sinkhorn's gradients."""
    from tidegate.train.step import train_step, update_routers

    losses = {}
    for router in ROUTERS:
        model = model_with(router)
        for layout in [sinkhorn] if router == "sinkhorn" else layouts:
            expert, zero_stage, accumulation = layout
            parallel = ParallelConfig(expert=expert, zero_stage=zero_stage)
            engine = engine_for(parallel, accumulation, clip=0.3, model=model)
            budget = {"target": 0.4} if router.startswith("uneven") else None
            balance = BalanceConfig.model_validate({"loss_weight": 0.1, "budget": budget})
            world_size = collectives.world_size()
            balancer = Balancer(balance, collectives.all_reduce, world_size, accumulation, model.ffn)
            steps = []
            for step in range(3):
                engine.set_learning_rate(1e-2)
                result = train_step(engine, balancer, part_of(step, accumulation), clock_at(step), isolate=True)
                summed = torch.stack([*result.losses])
                update_routers(engine.model, balancer, clock_at(step), balance.bias_rate)
                collectives.all_reduce(summed)
                steps.append([*summed.tolist(), engine.gradient_norm()])
            losses[router, layout] = steps
    expert, _, accumulation = sinkhorn
    return losses, reduced_gradients(EXACT, accumulation, expert, model_with("sinkhorn"))


def test_every_router_trains_as_in_one_process(on_ranks: Callable[..., list[RouterRuns]]) -> None:
    """EP 2, and DP 2 with accumulation: three clipped AdamW steps agree to 1e-5, controllers and schedules included.

    A Sinkhorn plan over the rows of the ranks that share the experts is one process's plan, where these ranks are all,
    and its gradient comes back to the rows of other ranks.
    """
    once = (1, 1, 1)
    ((alone, truth),) = on_ranks(1, router_runs, [once], once)
    for rank, (losses, gradients) in enumerate(on_ranks(2, router_runs, [(2, 1, 1), (1, 1, 2)], (2, 1, 1))):
        assert {router for router, _ in losses} == set(ROUTERS)
        for (router, layout), steps in losses.items():
            expected = torch.tensor(alone[router, once])
            assert len(set(expected[:, 0].tolist())) == 3, "nothing trained"
            torch.testing.assert_close(
                torch.tensor(steps), expected, rtol=1e-5, atol=1e-6, msg=lambda m, at=(router, layout): f"{at}: {m}"
            )
        for name, gradient in gradients.items():
            whole = truth[name]
            expected = whole if gradient.shape == whole.shape else whole.chunk(2)[rank]
            assert relative_error(gradient, expected) < GRADIENT_TOLERANCE, (name, rank)


def test_bf16_expert_parallel_training_stays_near_fp32(on_ranks: Any) -> None:
    """bf16 weights round to 3 digits: losses within 1 % of fp32, on every ZeRO stage."""
    layouts = [(2, 1, 2), (2, 2, 2), (2, 0, 1)]
    (alone,) = on_ranks(1, train_losses, [(1, 1, 1)], "fp32")
    (half, _) = on_ranks(2, train_losses, layouts, "bf16")
    for layout, run in zip(layouts, half, strict=True):
        nll, truth = torch.tensor(run)[:, 0], torch.tensor(alone[0])[:, 0]
        torch.testing.assert_close(nll, truth, rtol=1e-2, atol=0, msg=lambda m, at=layout: f"{at}: {m}")


def test_an_optimizer_on_the_host_trains_alike(on_ranks: Any) -> None:
    """In fp32 as one process; in bf16 as at ZeRO 2 on the device, but for how norms are summed."""
    layouts = [(2, 1, 2), (2, 2, 2)]
    (alone,) = on_ranks(1, train_losses, [(1, 1, 1)], "fp32")
    (single, _) = on_ranks(2, train_losses, layouts, "fp32", MODEL, "optimizer")
    for layout, run in zip(layouts, single, strict=True):
        torch.testing.assert_close(
            torch.tensor(run), torch.tensor(alone[0]), rtol=1e-5, atol=1e-6, msg=lambda m, at=layout: f"{at}: {m}"
        )
    (half, _) = on_ranks(2, train_losses, layouts, "bf16", MODEL, "optimizer")
    (on_device, _) = on_ranks(2, train_losses, layouts[1:], "bf16")
    for run in half:
        torch.testing.assert_close(torch.tensor(run), torch.tensor(on_device[0]), rtol=1e-3, atol=1e-4)


def test_an_optimizer_on_the_host_continues_bitwise(on_ranks: Any, tmp_path: Path) -> None:
    layouts = [(2, 1, 1), (2, 2, 2)]
    for rank in on_ranks(2, continue_from_checkpoint, str(tmp_path), layouts, "bf16", MODEL, "optimizer"):
        for layout, (straight, resumed) in zip(layouts, rank, strict=True):
            assert resumed == straight, layout


def test_moments_in_bf16_train_alike(on_ranks: Any) -> None:
    """Beside fp32 ones: losses, 1 % after five steps at a large rate. Roundings hang on places, not on data ranks."""
    layouts = [(1, 1, 1)]
    (whole,) = on_ranks(1, train_losses, layouts, "bf16")
    (half,) = on_ranks(1, train_losses, layouts, "bf16", MODEL, "none", "bf16")
    assert half != whole
    torch.testing.assert_close(torch.tensor(half)[0, :, 0], torch.tensor(whole)[0, :, 0], rtol=1e-2, atol=0)
    (spread, _) = on_ranks(2, train_losses, [(1, 1, 1), (2, 1, 1)], "bf16", MODEL, "none", "bf16")
    for run in spread:
        torch.testing.assert_close(torch.tensor(run)[:, 0], torch.tensor(whole)[0, :, 0], rtol=1e-2, atol=0)


def test_moments_in_bf16_continue_bitwise(on_ranks: Any, tmp_path: Path) -> None:
    layouts = [(2, 1, 2)]
    for rank in on_ranks(2, continue_from_checkpoint, str(tmp_path), layouts, "bf16", MODEL, "none", "bf16"):
        for straight, resumed in rank:
            assert resumed == straight


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
    return float(train_step(engine, balancer, part_of(0, 1), Clock(1, 1, 0), isolate=True).losses.nll)


def test_a_rank_whose_experts_get_no_rows_takes_part(on_ranks: Callable[..., list[float]]) -> None:
    assert all(torch.isfinite(torch.tensor(loss)) for loss in on_ranks(2, all_dead_but_one))


class Files:
    """A checkpoint in a folder, the plain way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, Any] = {}

    def put(self, name: str, content: Any) -> None:
        self.contents[name] = content

    def write(self) -> None:
        for name, content in self.contents.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, self.folder / name)

    def fetch(self, name: str) -> Any:
        return (self.folder / name).open("rb")

    def names(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.pt")]


def continue_from_checkpoint(
    folder: str,
    layouts: list[Layout],
    precision: str,
    model: ModelConfig = MODEL,
    offload: Any = "none",
    state: Any = "fp32",
) -> list[tuple[list[float], list[float]]]:
    """Per layout: losses of steps 3 and 4 straight through, and from a checkpoint taken after step 2."""
    from tidegate.train.step import train_step, update_routers

    def steps(engine: Any, accumulation: int, which: range) -> list[float]:
        balance = BalanceConfig(bias_rate=0.01)
        balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation)
        if isinstance(model.ffn, DenseConfig):
            balancer = None
        losses = []
        for step in which:
            engine.set_learning_rate(1e-2)
            result = train_step(engine, balancer, part_of(step, accumulation), clock_at(step), isolate=True)
            if balancer is not None:
                update_routers(engine.model, balancer, clock_at(step), balance.bias_rate)
            losses += [*torch.stack(result.losses[:3]).tolist(), float(engine.gradient_norm())]
        return losses

    runs = []
    for number, (expert, zero_stage, accumulation) in enumerate(layouts):
        parallel = ParallelConfig(expert=expert, zero_stage=zero_stage, offload=offload)
        files = Files(Path(folder) / str(number))
        engine = engine_for(parallel, accumulation, precision, clip=0.3, model=model, optimizer_state=state)
        steps(engine, accumulation, range(3))
        engine.save(files.put, {"step": 3})
        straight = steps(engine, accumulation, range(3, 5))
        files.write()  # only now: the snapshot must not have followed the steps
        torch.distributed.barrier()
        resumed = engine_for(parallel, accumulation, precision, clip=0.3, model=model, optimizer_state=state)
        assert resumed.load(files.fetch, files.names()) == {"step": 3}
        runs.append((straight, steps(resumed, accumulation, range(3, 5))))
    return runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_continues_bitwise_at_every_zero_stage(on_ranks: Any, tmp_path: Path, precision: str) -> None:
    layouts = [(2, 1, 1), (2, 2, 2), (2, 0, 1)]
    for rank in on_ranks(4, continue_from_checkpoint, str(tmp_path), layouts, precision):
        for layout, (straight, resumed) in zip(layouts, rank, strict=True):
            assert resumed == straight, layout


@pytest.mark.parametrize("model", [UNUSUAL, RELU2], ids=["poly_norm", "relu2"])
def test_experts_without_a_third_matrix_continue_bitwise(on_ranks: Any, tmp_path: Path, model: ModelConfig) -> None:
    layouts = [(2, 1, 1), (2, 0, 1)]
    for rank in on_ranks(2, continue_from_checkpoint, str(tmp_path), layouts, "bf16", model):
        for layout, (straight, resumed) in zip(layouts, rank, strict=True):
            assert resumed == straight, layout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dense_models_continue_bitwise(on_ranks: Any, tmp_path: Path, precision: str) -> None:
    layouts = [(1, 0, 1), (1, 1, 2), (1, 2, 1)]
    for rank in on_ranks(2, continue_from_checkpoint, str(tmp_path), layouts, precision, DENSE):
        for layout, (straight, resumed) in zip(layouts, rank, strict=True):
            assert resumed == straight, layout


def decayed_and_not() -> tuple[set[str], set[str]]:
    engine = engine_for(ParallelConfig(zero_stage=0), 1, model=UNUSUAL)
    names = {id(p): name.removeprefix("blocks.0.") for name, p in engine.model.named_parameters()}
    sets: tuple[set[str], set[str]] = set(), set()
    for group in engine._engine.optimizer.param_groups:
        sets[group["weight_decay"] == 0].update(names[id(p)] for p in group["params"])
    return sets


def test_only_matrices_are_decayed(on_ranks: Any) -> None:
    ((decayed, kept),) = on_ranks(1, decayed_and_not)
    assert not decayed & kept
    assert {"ffn.experts.w1", "ffn.experts.w2", "attention.wq.weight", "attention_norm.w1.weight"} <= decayed
    assert {"ffn.experts.w3", "ffn.shared_experts.coefficients", "attention.sink", "ffn_norm.weight"} <= kept


def settings_after_load(folder: str) -> list[tuple[float, float]]:
    found = []
    for zero_stage in (0, 1, 2):
        parallel = ParallelConfig(zero_stage=zero_stage)
        files = Files(Path(folder) / str(zero_stage))
        engine_for(parallel, 1, clip=0.3).save(files.put, {})
        files.write()
        engine = engine_for(parallel, 1, clip=9.0, weight_decay=0.5)
        engine.load(files.fetch, files.names())
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
        batch = StepBatch(tokens, documents, counted, *torch.zeros(2, accumulation, 1, dtype=torch.int64))
        train_step(engine, balancer, batch, Clock(1, 1, 0), isolate=True)
        norms.append(float(engine.gradient_norm()))
    return norms


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_bf16_gradients_are_summed_in_fp32(on_ranks: Any, zero_stage: int) -> None:
    """128 equal micro-batches have the gradient of one; sums in bf16 would be off by several tenths of a percent."""
    ((once, often),) = on_ranks(1, norms_of_repeated_micro_batches, [1, 128], zero_stage)
    assert often == pytest.approx(once, rel=1e-4)


class AfterBadStep(NamedTuple):
    norms: list[float]
    losses: list[float]
    untouched: bool
    """Weights, moments and step counts were the same after the bad step as before."""


def step_with_bad_gradients(layouts: list[tuple[int, ParallelConfig, str]]) -> list[AfterBadStep]:
    """Three steps, the second with an infinite gradient on the last rank only."""
    from tidegate.train.step import train_step

    results = []
    for accumulation, parallel, precision in layouts:
        engine = engine_for(parallel, accumulation, precision, clip=0.3)
        engine.set_learning_rate(0.01)
        balancer = Balancer(EXACT, collectives.all_reduce, collectives.world_size(), accumulation)
        norms, losses, snapshots = [], [], []
        for step in range(3):
            bad = step == 1 and collectives.rank() == collectives.world_size() - 1
            weight = engine.model.blocks[0].attention.wq.weight
            spoil = weight.register_hook(lambda g: g * torch.inf) if bad else None
            result = train_step(engine, balancer, part_of(step, accumulation), clock_at(step), isolate=True)
            if spoil is not None:
                spoil.remove()
            loss = result.losses.nll
            collectives.all_reduce(loss)
            losses.append(float(loss))
            norms.append(float(engine.gradient_norm()))
            inner = getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
            states = [v for state in inner.state.values() for v in state.values()]
            masters = [weight for group in inner.param_groups for weight in group["params"]]
            snapshots.append([t.detach().clone() for t in (*states, *masters, *engine.model.parameters())])
        untouched = all(map(torch.equal, snapshots[0], snapshots[1]))
        changed = not all(map(torch.equal, snapshots[1], snapshots[2]))
        results.append(AfterBadStep(norms, losses, untouched and changed))
    return results


def test_a_step_with_infinite_gradients_changes_nothing_on_any_rank(on_ranks: Any) -> None:
    layouts = [
        (2, ParallelConfig(zero_stage=stage), precision) for stage in (0, 1, 2) for precision in ("fp32", "bf16")
    ]
    layouts.append((1, ParallelConfig(expert=2), "bf16"))
    layouts.append((2, ParallelConfig(zero_stage=2, offload="optimizer"), "bf16"))
    for rank in on_ranks(2, step_with_bad_gradients, layouts):
        for layout, result in zip(layouts, rank, strict=True):
            assert result.untouched, layout
            assert not math.isfinite(result.norms[1]), layout
            assert math.isfinite(result.norms[0] + result.norms[2] + sum(result.losses)), layout


def norms_and_weights(paths: list[tuple[int, bool]]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Of each ZeRO stage, with rows of the embedding's gradient or with all of it: after three steps."""
    from tidegate.train.step import train_step

    found = []
    for zero_stage, rows_only in paths:
        engine = engine_for(ParallelConfig(expert=2, zero_stage=zero_stage), 2, "bf16", clip=0.05)
        assert engine.model.embedding.sparse_gradient == (zero_stage == 1)
        engine.model.embedding.sparse_gradient = rows_only
        engine.set_learning_rate(0.01)
        balancer = Balancer(EXACT, collectives.all_reduce, collectives.world_size(), 2)
        for step in range(3):
            train_step(engine, balancer, part_of(step, 2), clock_at(step), isolate=True)
        weights = {name: p.detach().float().clone() for name, p in engine.model.named_parameters()}
        found.append((float(engine.gradient_norm()), weights))
    return found


def test_clipped_bf16_steps_are_those_of_deepspeeds_own_path(on_ranks: Any) -> None:
    """ZeRO 1 takes our path from gradient to optimizer, ZeRO 2 takes DeepSpeed's; EP 2 x DP 2."""
    # The sum over an embedding's rows is in fp32 by rows, and in bf16, which loses digits, otherwise.
    bounds = {"rows of the embedding": (2e-3, 5e-3), "all of it": (1e-3, 2e-3)}
    for *ours, (other_norm, others) in on_ranks(4, norms_and_weights, [(1, True), (1, False), (2, False)]):
        for (path, (of_norm, of_weights)), (norm, weights) in zip(bounds.items(), ours, strict=True):
            assert norm == pytest.approx(other_norm, rel=of_norm), path
            for name, weight in weights.items():
                apart = (weight - others[name]).abs().mean() / weight.abs().mean()
                assert apart < of_weights, (path, name)


def losses_by_gradients_at_once(cuts: list[tuple[int, int]]) -> list[list[list[float]]]:
    """Of each cut into (EP, micro-batches): losses of four steps, gradients added one, two and three at a time."""
    from tidegate.train.step import train_step

    found = []
    for expert, accumulation in cuts:
        runs = []
        for at_once in (1, 2, 3):
            parallel = ParallelConfig(expert=expert, zero_stage=1, gradients_at_once=at_once)
            engine = engine_for(parallel, accumulation, "bf16", clip=0.3)
            engine.set_learning_rate(0.01)
            balancer = Balancer(EXACT, collectives.all_reduce, collectives.world_size(), accumulation)
            losses = []
            for step in range(4):
                batch = part_of(step, 4)
                batch = StepBatch(*(t[:accumulation] for t in batch))
                losses.append(train_step(engine, balancer, batch, clock_at(step), isolate=True).losses.nll.item())
            runs.append(losses)
        found.append(runs)
    return found


def test_gradients_added_at_once_are_the_same_bits(on_ranks: Any) -> None:
    for rank in on_ranks(2, losses_by_gradients_at_once, [(1, 1), (1, 2), (2, 3), (1, 4)]):
        for singly, in_pairs, in_threes in rank:
            assert in_pairs == in_threes == singly
            assert len(set(singly)) == 4
