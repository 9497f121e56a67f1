"""Ranks that hold other bits than their replicas are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.attention import AttentionConfig
from tidegate.model.decoder import ModelConfig
from tidegate.model.moe import MoEConfig
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig
from tidegate.train.replicas import ReplicasDiffer, compare_replicas, odd_ones

MODEL = ModelConfig(
    vocab_size=97,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=MoEConfig(num_experts=4, top_k=2, expert_dim=16),
)


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of one number."""
    with torch.no_grad():
        tensor.view(-1)[3:4].view(torch.int16)[0] ^= 1


def found(precision: Any) -> list[str]:
    from tidegate.parallel.engine import Engine

    engine = Engine(
        MODEL,
        ParallelConfig(expert=2),
        precision=precision,
        seed=0,
        micro_batch=1,
        accumulation=1,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        gradient_clip=0.0,
        recompute=False,
    )
    layer = engine.model.blocks[1].ffn
    planted = {
        0: layer.experts.w2,
        1: engine.model.embedding.weight,
        2: layer.router.expert_bias,
        3: engine.model.blocks[0].attention.wq.weight,
    }
    messages = []
    for culprit in range(-1, 4):
        tensor = planted.get(culprit)
        before = None if tensor is None else tensor.detach().clone()
        loss = 3.0
        if collectives.rank() == culprit:
            assert tensor is not None
            flip(tensor)
            loss = 3.0000000000000004 if culprit == 3 else 3.0
        try:
            compare_replicas(engine, 2, 9, {"loss": loss})
        except ReplicasDiffer as error:
            messages.append(str(error))
        else:
            messages.append("")
        if tensor is not None and before is not None:
            with torch.no_grad():
                tensor.copy_(before)
    return messages


def test_one_wrong_bit_on_a_rank_is_found_and_the_rank_named(on_ranks: Callable[..., list[Any]]) -> None:
    """Four ranks in two groups of experts: ranks 0 and 2 hold the same experts."""
    for messages in on_ranks(4, found, "bf16"):
        start = "step 9: not the bits that other ranks have: "
        assert messages == [
            "",
            f"{start}experts of ranks 0, 2",
            f"{start}weights of rank 1",
            f"{start}router state of rank 2",
            f"{start}weights of rank 3; loss of rank 3",
        ]


@pytest.mark.parametrize(
    ("sums", "odd"), [([5], []), ([5, 5], []), ([5, 6], [0, 1]), ([5, 6, 5], [1]), ([5, 6, 7], [0, 1, 2])]
)
def test_the_majority_is_right(sums: list[int], odd: list[int]) -> None:
    assert odd_ones(sums) == odd
