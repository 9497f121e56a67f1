"""Self-tuning under the real engine, in real gloo processes: the same hyperparameters at any world size.

AdamW's eps is large here, as in test_unit_gates.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tidegate.data.loader import StepBatch
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import Clock
from tidegate.model.decoder import ModelConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

SEQUENCES, LENGTH, STEPS = 8, 19, 6
MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 61,
        "width": 16,
        "num_layers": 2,
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
        "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 24, "shared": {"num": 1}},
        "init_std": 0.2,
        "self_tune": {
            "tuned": {"balance_scale": 1.0, "temperature": 1.0, "noise": 0.1, "dropout": 0.1},
            "rate": 0.1,
            "entropy": 0.0,
        },
    }
)


class Layout(NamedTuple):
    expert: int
    zero_stage: Any
    accumulation: int
    precision: Any = "fp32"


class Run(NamedTuple):
    points: list[list[float]]
    """Hyperparameters and spreads after each step."""
    losses: list[float]
    weights_stayed: bool
    """Through held-out steps, to the bit."""
    state: dict[str, torch.Tensor]


def engine_for(layout: Layout) -> Any:
    from tidegate.parallel.engine import Engine

    return Engine(
        MODEL,
        ParallelConfig(expert=layout.expert, zero_stage=layout.zero_stage),
        precision=layout.precision,
        seed=0,
        micro_batch=SEQUENCES // collectives.world_size() // layout.accumulation,
        accumulation=layout.accumulation,
        betas=(0.9, 0.95),
        eps=1e-2,
        weight_decay=0.1,
        gradient_clip=1.0,
        recompute=layout.expert == 2,
    )


def part_of(step: int, accumulation: int) -> StepBatch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 61, (SEQUENCES, LENGTH + 1), generator=generator)
    counted = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.linspace(0.2, 1.0, SEQUENCES)[:, None]
    mine = torch.arange(SEQUENCES).view(accumulation, collectives.world_size(), -1)[:, collectives.rank()]
    documents = torch.zeros(*mine.shape, LENGTH, dtype=torch.int32)
    return StepBatch(tokens[mine], documents, counted[mine], torch.zeros_like(mine), mine)


def train(engine: Any, layout: Layout, steps: range) -> Run:
    from tidegate.train.step import train_step, tune_step

    config = BalanceConfig(loss_weight=0.1)
    balancer = Balancer(config, collectives.all_reduce, collectives.world_size(), layout.accumulation)
    tuning = engine.model.self_tuning
    points, losses, stayed = [], [], True
    for step in steps:
        clock = Clock(step, 1000 * step, 7)
        engine.set_learning_rate(3e-2)
        result = train_step(engine, balancer, part_of(step, layout.accumulation), clock, isolate=True)
        values = torch.stack(result.losses)
        collectives.all_reduce(values)
        losses += values.tolist()
        before = [parameter.clone() for parameter in engine.model.parameters()]
        tune_step(engine, part_of(100 + step, layout.accumulation), clock, isolate=True)
        after = engine.model.parameters()
        stayed = stayed and all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        points.append([*tuning.location.tolist(), *tuning.log_spread.tolist()])
    state = {name: tensor.detach().clone() for name, tensor in tuning.state_dict().items()}
    return Run(points, losses, stayed, state)


def train_all(layouts: list[Layout]) -> list[tuple[Run, Run]]:
    """Each layout straight through, and from a checkpoint after two steps."""
    runs = []
    for layout in layouts:
        engine = engine_for(layout)
        train(engine, layout, range(1, 3))
        files: dict[str, bytes] = {}

        def put(name: str, content: Any, files: dict[str, bytes] = files) -> None:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            files[name] = buffer.getvalue()

        engine.save(put, {})
        everyone: dict[str, bytes] = {}
        for of_rank in collectives.gather(files):
            everyone |= of_rank
        straight = train(engine, layout, range(3, STEPS + 1))
        again = engine_for(layout)
        again.load(lambda name, everyone=everyone: io.BytesIO(everyone[name]), everyone)
        runs.append((straight, train(again, layout, range(3, STEPS + 1))))
    return runs


def test_hyperparameters_move_alike_in_every_layout_and_after_a_restart(on_ranks: Callable[..., Any]) -> None:
    layouts = [Layout(2, 1, 1), Layout(1, 0, 2), Layout(2, 1, 2, "bf16")]
    ((truth,),) = on_ranks(1, train_all, [Layout(1, 1, 1)])
    ranks = on_ranks(2, train_all, layouts)
    moved = torch.tensor(truth[0].points[-1]) - torch.tensor([0, 0, *torch.tensor([0.1, 1 / 9]).log(), *[0.0] * 4])
    assert (moved[:4].abs() > 0.02).all(), "every hyperparameter moves"
    for layout, first, second in zip(layouts, *ranks, strict=True):
        for straight, resumed in (first, second):
            assert straight.weights_stayed, layout
            assert resumed.points == straight.points, (layout, "a restart changes nothing")
        assert all(torch.equal(tensor, second[0].state[name]) for name, tensor in first[0].state.items()), layout
        rough = layout.precision == "bf16"
        found, expected = torch.tensor(first[0].losses), torch.tensor(truth[0].losses)
        torch.testing.assert_close(found, expected, rtol=3e-2 if rough else 1e-3, atol=1e-2 if rough else 1e-4)
        if not rough:
            points, wanted = torch.tensor(first[0].points), torch.tensor(truth[0].points)
            torch.testing.assert_close(points, wanted, rtol=0, atol=5e-3, msg=lambda m, at=layout: f"{at}: {m}")
