"""One router for all layers: one decision, causal, inside documents, trained by every layer.

Letters: B sequences, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.routers import Routing
from tidegate.model.routers.decoupled import DecoupledConfig


@pytest.fixture
def model(model_config: Callable[..., ModelConfig]) -> Decoder:
    ffn = {"kind": "moe", "num_experts": 7, "top_k": 3, "expert_dim": 8}
    ffn["router"] = {"kind": "decoupled", "width": 16, "num_heads": 2}
    config = model_config(ffn=ffn, num_layers=3, init_std=0.3)
    return materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)


def run(model: Decoder, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> tuple[Routing, Any]:
    routings: list[Routing] = []
    hook = model.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    counted = torch.ones(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
    output = model(tokens[:, :-1], tokens[:, 1:], counted, documents)
    hook.remove()
    (routing,) = routings  # one call serves all layers
    return routing, output


def test_one_routing_for_all_layers(model: Decoder) -> None:
    tokens = torch.randint(0, 101, (4, 10))
    routing, output = run(model, tokens)
    assert all(block.ffn.router is None for block in model.blocks)
    assert model.routers() == [model.router]
    counts = torch.bincount(routing.experts_NS.flatten(), minlength=7).float()
    assert torch.equal(output.stats.counts_BE.sum(1), counts.expand(3, 7))


def test_it_is_top_k_of_a_softmax(model: Decoder) -> None:
    routing, _ = run(model, torch.randint(0, 101, (4, 10)))
    best = routing.logits_NE.softmax(-1).topk(3, dim=-1)
    assert torch.equal(best.indices, routing.experts_NS)
    torch.testing.assert_close(routing.weights_NS, best.values / best.values.sum(-1, keepdim=True))
    assert len({tuple(row) for row in routing.experts_NS.sort(1).values.tolist()}) > 3


def test_it_is_causal_and_looks_back(model: Decoder) -> None:
    tokens = torch.randint(0, 101, (4, 10))
    before = run(model, tokens)[0].probs_NE.view(4, 9, 7)
    later = tokens.clone()
    later[:, 5:] = torch.randint(0, 101, (4, 5))
    assert torch.equal(run(model, later)[0].probs_NE.view(4, 9, 7)[:, :5], before[:, :5])
    earlier = tokens.clone()
    earlier[:, 0] = (tokens[:, 0] + 1) % 101
    after = run(model, earlier)[0].probs_NE.view(4, 9, 7)
    assert ((after - before).abs().amax(-1) > 1e-6).all(), "every later token sees the first"


def test_documents_do_not_see_each_other(model: Decoder) -> None:
    tokens, documents = torch.randint(0, 101, (4, 10)), torch.tensor([[0] * 4 + [1] * 5]).expand(4, -1)
    before = run(model, tokens, documents)[0].probs_NE.view(4, 9, 7)
    changed = tokens.clone()
    changed[:, :4] = torch.randint(0, 101, (4, 4))
    assert torch.equal(run(model, changed, documents)[0].probs_NE.view(4, 9, 7)[:, 4:], before[:, 4:])
    assert not torch.allclose(run(model, changed)[0].probs_NE.view(4, 9, 7)[:, 4:], before[:, 4:])


def test_the_gradient_reaches_all_of_the_router_from_every_layer(model: Decoder) -> None:
    tokens = torch.randint(0, 101, (4, 10))
    run(model, tokens)[1].nll.backward()
    for name, parameter in model.router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    # Each layer adds its own balance gradient, all equal: the decision is one.
    gradients = []
    for layer in range(3):
        model.zero_grad()
        (run(model, tokens)[1].stats.prob_sums_BE[layer] * torch.linspace(-1, 1, 7)).sum().backward()
        gradients.append(model.router.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width=24 is not an even number of dimensions for num_heads=5"):
        DecoupledConfig(width=24, num_heads=5)
