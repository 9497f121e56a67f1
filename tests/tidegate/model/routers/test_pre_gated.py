"""Pre-gated routing: a block's experts are known before the block begins.

Letters: L blocks, B sequences, T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.routers import Routing


@pytest.fixture
def decoder(model_config: Callable[..., ModelConfig]) -> Callable[..., Decoder]:
    def make(reads: str = "previous_block", recompute: bool = False) -> Decoder:
        ffn = {"kind": "moe", "num_experts": 7, "top_k": 3, "expert_dim": 8}
        ffn["router"] = {"kind": "softmax_top_k", "reads": reads}
        config = model_config(ffn=ffn, num_layers=3, init_std=0.3)
        return materialize(lambda: Decoder(config, recompute=recompute), torch.device("cpu"), seed=0)

    return make


def run(model: Decoder) -> tuple[list[Routing], list[torch.Tensor], Any]:
    """Each block's routing, and what its feed-forward read."""
    routings: list[Routing] = []
    inputs: list[torch.Tensor] = []
    hooks = [block.ffn.router.register_forward_hook(lambda m, a, out: routings.append(out)) for block in model.blocks]
    hooks += [block.ffn.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for block in model.blocks]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 101, (3, 10), generator=generator)
    output = model(tokens[:, :-1], tokens[:, 1:], torch.ones(3, 9, dtype=torch.bool), clock=Clock(1, 1, 0))
    for hook in hooks:
        hook.remove()
    return routings, inputs, output


def test_each_block_routes_by_what_the_one_before_read(decoder: Callable[..., Decoder]) -> None:
    model = decoder()
    routings, inputs, _ = run(model)
    assert len(routings) == len(inputs) == 3
    for layer, source in enumerate((0, 0, 1)):  # the first block reads its own
        weight = model.blocks[layer].ffn.router.weight
        expected = (inputs[source].flatten(0, 1) @ weight.T).softmax(-1)
        torch.testing.assert_close(routings[layer].probs_NE, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_blocks_own_attention_does_not_change_its_experts(layer: int, decoder: Callable[..., Decoder]) -> None:
    for reads, same in (("previous_block", True), ("own", False)):
        model = decoder(reads)
        before, inputs_before, _ = run(model)
        with torch.no_grad():
            model.blocks[layer].attention.wv.weight.add_(torch.randn_like(model.blocks[layer].attention.wv.weight))
        after, inputs_after, _ = run(model)
        assert not torch.allclose(inputs_before[layer], inputs_after[layer])
        assert torch.equal(before[layer].experts_NS, after[layer].experts_NS) is same
        assert torch.equal(before[layer].weights_NS, after[layer].weights_NS) is same


def test_perturbing_the_block_before_does_change_them(decoder: Callable[..., Decoder]) -> None:
    model = decoder()
    before, *_ = run(model)
    with torch.no_grad():
        model.blocks[0].attention.wv.weight.normal_()
    after, *_ = run(model)
    assert all(
        not torch.equal(one.experts_NS, other.experts_NS) for one, other in zip(before[:2], after[:2], strict=True)
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_reaches_every_router(recompute: bool, decoder: Callable[..., Decoder]) -> None:
    gradients = []
    for again in (False, recompute):
        model = decoder(recompute=again)
        run(model)[2].nll.backward()
        gradients.append([block.ffn.router.weight.grad for block in model.blocks])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().amax(1).min() > 1e-4
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_one_block_has_no_block_before(model_config: Callable[..., ModelConfig]) -> None:
    ffn = {"kind": "moe", "num_experts": 7, "top_k": 3, "expert_dim": 8}
    ffn["router"] = {"kind": "sigmoid_top_k", "reads": "previous_block"}
    with pytest.raises(ValueError, match=r"reads=previous_block, but num_layers=1"):
        model_config(ffn=ffn, num_layers=1)
