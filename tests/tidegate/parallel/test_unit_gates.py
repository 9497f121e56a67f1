"""Unit gates in real gloo processes under the real engine: one mask at any world size, and after a restart.

The truth is the engine at world size 1. AdamW's eps is large here: with the usual one, the first steps are the signs of
gradients, and the sign of a gradient that is zero but for rounding is another one on another number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import Clock
from tidegate.model.decoder import ModelConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

SEQUENCES, LENGTH, VOCAB = 8, 33, 97
STEPS, FREEZE = 5, 4
CHANNELS, EXPERTS = ("heads", "channels"), ("heads", "experts")

CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "straight_through": ({"kind": "straight_through"}, CHANNELS),
    "straight_through_experts": ({"kind": "straight_through", "estimator": "plain"}, EXPERTS),
    "reinforce": ({"kind": "reinforce", "rate": 1.0}, CHANNELS),
    "reinforce_experts": ({"kind": "reinforce", "rate": 1.0}, EXPERTS),
    "hard_concrete": ({"kind": "hard_concrete"}, CHANNELS),
    "hard_concrete_experts": ({"kind": "hard_concrete"}, EXPERTS),
    "hard_concrete_blocks": ({"kind": "hard_concrete"}, ("blocks",)),
    "polarization": ({"kind": "polarization"}, EXPERTS),
    "continuation": ({"kind": "continuation"}, CHANNELS),
    "knapsack": ({"kind": "knapsack"}, CHANNELS),
    "knapsack_experts": ({"kind": "knapsack"}, EXPERTS),
    "random": ({"kind": "random", "densities": "erk"}, CHANNELS),
    "dynamic_sparse": ({"kind": "dynamic_sparse", "every": 2}, CHANNELS),
    "dynamic_sparse_experts": ({"kind": "dynamic_sparse", "every": 1, "growth": "random"}, EXPERTS),
    "dynamic_sparse_blocks": ({"kind": "dynamic_sparse", "every": 1}, ("blocks",)),
    "nested": ({"kind": "nested", "keeps": [0.5, 1.0]}, CHANNELS),
}


RESTARTED = [case for case in CASES if not case.endswith(("_experts", "_blocks"))]
"""Each method once: what is gated makes no difference to its state."""


def model_for(case: str) -> ModelConfig:
    method, over = CASES[case]
    fixed = method["kind"] in ("random", "nested")
    units = {"over": over, "keep": 0.5, "method": method, "freeze_tokens": None if fixed else 1000 * FREEZE}
    return ModelConfig.model_validate(
        {
            "vocab_size": VOCAB,
            "width": 32,
            "num_layers": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": 8, "top_k": 2, "expert_dim": 32, "shared": {"num": 1}},
            "init_std": 0.1,
            "units": units,
        }
    )


class Layout(NamedTuple):
    expert: int
    zero_stage: Any
    accumulation: int
    precision: Any = "fp32"
    recompute: bool = False


class Run(NamedTuple):
    masks: list[torch.Tensor]
    """Hard mask after each step."""
    costs: list[float]
    """Expected share after each step."""
    losses: list[float]
    state: dict[str, torch.Tensor]
    """Of the gates at the end."""


def part_of(step: int, accumulation: int) -> StepBatch:
    """This rank's part, cut as the loader cuts it; sequences hold unequal numbers of counted tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.arange(SEQUENCES)[:, None] * 9 + torch.randint(0, 20, (SEQUENCES, LENGTH + 1), generator=generator)
    documents = torch.arange(LENGTH).div(11, rounding_mode="floor").to(torch.int32).expand(SEQUENCES, -1)
    counted = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.linspace(0.2, 1.0, SEQUENCES)[:, None]
    mine = torch.arange(SEQUENCES).view(accumulation, collectives.world_size(), -1)[:, collectives.rank()]
    return StepBatch(tokens[mine], documents[mine], counted[mine], torch.zeros_like(mine), mine)


def engine_for(case: str, layout: Layout) -> Any:
    from tidegate.parallel.engine import Engine

    return Engine(
        model_for(case),
        ParallelConfig(expert=layout.expert, zero_stage=layout.zero_stage),
        precision=layout.precision,
        seed=0,
        micro_batch=SEQUENCES // collectives.world_size() // layout.accumulation,
        accumulation=layout.accumulation,
        betas=(0.9, 0.95),
        eps=1e-2,
        weight_decay=0.1,
        gradient_clip=1.0,
        recompute=layout.recompute,
    )


def train(engine: Any, layout: Layout, steps: range) -> Run:
    from tidegate.train.step import train_step, update_units

    gates = engine.model.units
    balancer = Balancer(
        BalanceConfig(loss_weight=0.1), collectives.all_reduce, collectives.world_size(), layout.accumulation
    )
    masks, costs, losses = [], [], []
    for step in steps:
        clock = Clock(step, 1000 * step, 7)
        engine.set_learning_rate(3e-2)
        result = train_step(engine, balancer, part_of(step, layout.accumulation), clock, isolate=True)
        update_units(engine.model, result.losses, clock)
        values = torch.stack(result.losses)
        collectives.all_reduce(values)
        losses += [*values.tolist(), float(engine.gradient_norm())]
        masks.append(gates.hard_mask().clone())
        costs.append(float(gates.expected_cost(clock).detach()) / gates.units.total_cost)
    return Run(masks, costs, losses, {name: tensor.clone() for name, tensor in gates.state_dict().items()})


def train_all(layouts: list[Layout]) -> list[dict[str, Run]]:
    return [
        {case: train(engine_for(case, layout), layout, range(1, STEPS + 1)) for case in CASES} for layout in layouts
    ]


LAYOUTS: dict[int, list[Layout]] = {
    1: [Layout(1, 1, 1), Layout(1, 0, 4, recompute=True)],
    2: [Layout(2, 1, 1), Layout(2, 2, 2, recompute=True), Layout(1, 1, 2)],
}


def test_masks_are_the_same_on_every_rank_and_at_every_world_size(on_ranks: Callable[..., Any]) -> None:
    """Losses to 1e-4: the same noise, the same budget terms once, the same global statistics."""
    ((truth, accumulated),) = on_ranks(1, train_all, LAYOUTS[1])
    ranks = on_ranks(2, train_all, LAYOUTS[2])
    for layout, *runs in zip(LAYOUTS[2], *ranks, strict=True):
        for case in CASES:
            first, second = (run[case] for run in runs)
            assert first.costs == second.costs, (case, layout)
            for name, tensor in first.state.items():
                assert torch.equal(tensor, second.state[name]), (case, layout, name)
            for mine, other in zip(first.masks, second.masks, strict=True):
                assert torch.equal(mine, other), (case, layout)
    others = [(LAYOUTS[1][1], accumulated), *zip(LAYOUTS[2], ranks[0], strict=True)]
    for layout, other in others:
        for case, expected in truth.items():
            run = other[case]
            torch.testing.assert_close(
                torch.tensor(run.losses),
                torch.tensor(expected.losses),
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, at=(case, layout): f"{at}: {m}",
            )
            assert run.costs == pytest.approx(expected.costs, abs=1e-4), (case, layout)
            if case == "reinforce":
                # It learns from differences of losses, in which the rounding of another cut (5e-7 of 4.7) is 1e-4.
                torch.testing.assert_close(run.state["logits_U"], expected.state["logits_U"], rtol=0, atol=2e-3)
                continue
            for mine, same in zip(run.masks, expected.masks, strict=True):
                assert torch.equal(mine, same), (case, layout)
    for case, run in truth.items():
        fixed = CASES[case][0]["kind"] == "nested"
        assert fixed or abs(run.costs[-1] - 0.5) <= 0.01, (case, "after freezing the cost is the budget")
        assert fixed or torch.equal(run.masks[FREEZE - 1], run.masks[FREEZE])


def continue_from_checkpoint(folder: str, layout: Layout) -> dict[str, tuple[Run, Run, Run]]:
    """Per case: the first two steps, the others straight through, and the others from a checkpoint."""
    runs = {}
    for case in RESTARTED:
        files: dict[str, Any] = {}
        engine = engine_for(case, layout)
        begun = train(engine, layout, range(1, 3))
        engine.save(files.__setitem__, {})
        straight = train(engine, layout, range(3, STEPS + 1))
        for name, content in files.items():
            place = Path(folder, case, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, place)
        torch.distributed.barrier()
        written = {path.relative_to(Path(folder, case)).as_posix(): path for path in Path(folder, case).rglob("*.pt")}
        resumed = engine_for(case, layout)
        resumed.load(lambda name, written=written: io.BytesIO(written[name].read_bytes()), written)
        runs[case] = (begun, straight, train(resumed, layout, range(3, STEPS + 1)))
    return runs


def test_a_checkpoint_continues_with_the_same_masks(on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Bitwise, and in bf16, where what gates learn outside the optimizer stays fp32."""
    layout = Layout(2, 1, 2, "bf16")
    for rank in on_ranks(2, continue_from_checkpoint, str(tmp_path), layout):
        for case, (begun, straight, resumed) in rank.items():
            assert resumed.losses == straight.losses, case
            assert resumed.costs == straight.costs, case
            assert all(map(torch.equal, resumed.masks, straight.masks)), case
            for name, tensor in straight.state.items():
                assert torch.equal(tensor, resumed.state[name]), (case, name)
            fp32 = [name for name in ("multiplier", "mask_U", "mean_gate_U", "logits_U") if name in begun.state]
            assert all(begun.state[name].dtype == torch.float32 for name in fp32), case
