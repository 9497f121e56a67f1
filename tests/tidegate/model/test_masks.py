"""Which weights masks keep: the largest over all matrices, exactly as many as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import pytest
import torch

from tidegate.model.decoder import ModelConfig
from tidegate.model.masks import prunable, prune_smallest
from tidegate.model.weights import ALL, Spec, Weights

SHAPES = {"a": (7, 9), "b": (3, 5, 11), "c": (1, 1)}
TOTAL = sum(map(prod, SHAPES.values()))


class InMemory(Weights):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        return self.tensors[name][rows].clone()


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> InMemory:
    generator = torch.Generator().manual_seed(seed)
    scales = {"a": 1.0, "b": 0.3, "c": 0.0}
    return InMemory({n: (torch.randn(s, generator=generator) * scales[n]).to(dtype) for n, s in SHAPES.items()})


def kept(masks: Mapping[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 63, 128, TOTAL])
def test_exactly_so_many_stay_and_none_that_goes_is_larger(keep: int, dtype: torch.dtype) -> None:
    weights = drawn(0, dtype)
    masks = prune_smallest(weights, SHAPES, None, keep)
    assert kept(masks) == keep
    stay = torch.cat([weights.read(name)[mask].abs() for name, mask in masks.items()])
    go = torch.cat([weights.read(name)[~mask].abs() for name, mask in masks.items()])
    assert keep == TOTAL or stay.min() >= go.max()


def test_a_round_prunes_only_what_the_rounds_before_left() -> None:
    before = prune_smallest(drawn(0), SHAPES, None, 150)
    after = prune_smallest(drawn(1), SHAPES, InMemory(before), 75)
    assert kept(after) == 75
    assert all(not (after[name] & ~before[name]).any() for name in SHAPES)
    assert kept(prune_smallest(drawn(1), SHAPES, None, 75)) == 75
    alone = prune_smallest(drawn(1), SHAPES, None, 75)
    assert any(not torch.equal(after[name], alone[name]) for name in SHAPES), "what was pruned is ranked again"


def test_equal_weights_go_in_the_order_of_their_place() -> None:
    ones = InMemory({name: torch.ones(shape) for name, shape in SHAPES.items()})
    masks = prune_smallest(ones, SHAPES, None, TOTAL - 3)
    assert masks["a"].flatten().tolist() == [False] * 3 + [True] * 60


def test_embeddings_norms_routers_gates_and_coefficients_are_never_pruned() -> None:
    config = {
        "vocab_size": 97,
        "width": 16,
        "num_layers": 1,
        "attention": {
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "augmented_query": 20,
            "gate": {"kind": "sdpa_output"},
        },
        "ffn": {"kind": "moe", "num_experts": 3, "top_k": 1, "expert_dim": 8, "shared": {"num": 1}},
    }
    config["ffn"]["activation"] = "poly_norm"  # type: ignore[index]
    model = ModelConfig.model_validate(config)
    attention = {f"blocks.0.attention.w{letter}.weight" for letter in "qkvo"}
    attention |= {f"blocks.0.attention.augment.w{number}.weight" for number in (1, 2, 3)}
    shared = {f"blocks.0.ffn.shared_experts.w{number}.weight" for number in (1, 2)}
    experts = {f"blocks.0.ffn.experts.w{number}" for number in (1, 2)}
    assert set(prunable(model, ("attention", "ffn", "experts"))) == attention | shared | experts
    assert set(prunable(model, ("experts",))) == experts
    assert prunable(model, ("experts",))["blocks.0.ffn.experts.w1"] == (3, 8, 16)
