"""QK-clip under DeepSpeed: the same on any number of ranks, in the weights and in their fp32 truth.

Letters: L layers, H query heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.attention import AttentionConfig
from tidegate.model.clock import Clock
from tidegate.model.decoder import DenseConfig, ModelConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

SEQUENCES, LENGTH, VOCAB, THRESHOLD = 4, 17, 97, 2.5  # three heads of the second layer are above it
MODEL = ModelConfig(
    vocab_size=VOCAB,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=False, qk_clip=THRESHOLD),
    ffn=DenseConfig(hidden_dim=24),
    init_std=0.15,
)
AUGMENTED = MODEL.model_copy(
    update={"attention": MODEL.attention.model_copy(update={"augmented_query": 40, "qk_clip": 1.2})}
)


def largest_logits(engine: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(L, H) over the whole batch, by a pass that trains nothing."""
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    return engine.model(tokens[:, :-1], tokens[:, 1:], counted).max_logit_AH.detach()


def clipped_steps(
    zero_stage: int, accumulation: int, precision: Any, learning_rate: float, model: ModelConfig = MODEL
) -> dict[str, Any]:
    """Two steps; the largest logits before and after the first, and the weights after the second."""
    from tidegate.parallel.engine import Engine
    from tidegate.train.step import train_step

    engine = Engine(
        model,
        ParallelConfig(zero_stage=zero_stage),  # type: ignore[arg-type]
        precision=precision,
        seed=0,
        micro_batch=SEQUENCES // collectives.world_size() // accumulation,
        accumulation=accumulation,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        gradient_clip=0.0,
        recompute=False,
    )
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mine = torch.arange(SEQUENCES).view(accumulation, collectives.world_size(), -1)[:, collectives.rank()]
    mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    batch = StepBatch(tokens[mine], mask[mine].long(), mask[mine], torch.zeros_like(mine), mine)
    engine.set_learning_rate(learning_rate)
    found: dict[str, Any] = {"before": largest_logits(engine, tokens)}
    first = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    for step in range(2):
        train_step(engine, None, batch, Clock(1, 1, 0), isolate=False)
        if step == 0:
            found["after"] = largest_logits(engine, tokens)
            changed = {name for name, p in engine.model.named_parameters() if not torch.equal(p, first[name])}
            found["changed"] = changed
    found["weights"] = {name: p.detach().float().clone() for name, p in engine.model.named_parameters()}
    return found


def several(settings: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [clipped_steps(*setting) for setting in settings]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_heads_come_down_to_the_threshold_and_stay_there(on_ranks: Any, precision: str) -> None:
    """At a learning rate of 0 nothing else moves: what the second step starts from is the truth that was clipped.

    Were only the weights in use scaled, ZeRO's second step would write the old ones over them.
    """
    settings = [(stage, accumulation, precision, 0.0) for stage in (0, 1, 2) for accumulation in (1, 2)]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for rank in on_ranks(2, several, settings):
        for setting, found in zip(settings, rank, strict=True):
            before = found["before"]
            assert (before > THRESHOLD).tolist() == [[False] * 4, [True, True, False, True]], setting
            torch.testing.assert_close(found["after"], before.clamp(max=THRESHOLD), rtol=tolerance, atol=tolerance)
            assert found["changed"] == {f"blocks.1.attention.{name}.weight" for name in ("wq", "wk")}, setting
            for name, weight in found["weights"].items():
                assert torch.equal(weight, rank[0]["weights"][name]), (setting, name)


def test_augmented_queries_come_down_by_their_last_product(on_ranks: Any) -> None:
    """Half of what a SwiGLU is given is not half of what it gives, so W_q stays as it is."""
    for rank in on_ranks(2, several, [(stage, 1, "fp32", 0.0, AUGMENTED) for stage in (0, 1, 2)]):
        for found in rank:
            assert (found["before"] > 1.2).tolist() == [[False] * 4, [True, True, True, False]]
            torch.testing.assert_close(found["after"], found["before"].clamp(max=1.2), rtol=1e-5, atol=1e-5)
            names = {name.removeprefix("blocks.1.attention.") for name in found["changed"]}
            assert names == {"augment.w2.weight", "wk.weight"}


def test_the_cut_of_the_batch_changes_nothing(on_ranks: Any) -> None:
    """The largest logit sits in one sequence: every rank and micro-batch must hear of it."""
    (alone,) = on_ranks(1, several, [(0, 1, "fp32", 1e-3)])
    for rank in on_ranks(2, several, [(0, 2, "fp32", 1e-3), (1, 1, "fp32", 1e-3), (2, 2, "fp32", 1e-3)]):
        for found in rank:
            for name, weight in found["weights"].items():
                torch.testing.assert_close(weight, alone[0]["weights"][name], rtol=1e-4, atol=1e-5)
