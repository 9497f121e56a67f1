"""A mixture of copies of a dense feed-forward computes what the dense model does, whichever router picks them."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import torch
import yaml

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, DenseConfig, ModelConfig, materialize
from tidegate.model.moe import MoEConfig
from tidegate.model.routers import RouterConfig
from tidegate.model.upcycle import Upcycled, upcycling_problem
from tidegate.model.weights import ALL, Spec, Weights, load_weights, specs_of

pytestmark = pytest.mark.usefixtures("seeded_single_thread")

SIZES: dict[str, Any] = {"vocab_size": 97, "width": 24, "num_layers": 2, "init_std": 0.2}
ATTENTION = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6}
EVERY = [
    {"kind": option.model_fields["kind"].default, **(yaml.safe_load(f"{{{option.example}}}") or {})}
    for option in get_args(get_args(RouterConfig)[0])
]
ROUTERS: list[dict[str, Any]] = [
    *EVERY,
    {"kind": "softmax_top_k", "renormalize": False},
    {"kind": "sigmoid_top_k", "scale": 2.5},
    {"kind": "sqrt_softplus_top_k", "groups": {"num": 2, "keep": 1}},
]


class Held(Weights):
    """The tensors of a model in memory."""

    def __init__(self, model: Decoder) -> None:
        self.tensors, self._specs = model.state_dict(), specs_of(model.config)

    @property
    def specs(self) -> dict[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        return self.tensors[name].clone()[rows if rows != ALL else ...]


def config_of(ffn: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "attention": ATTENTION, "ffn": ffn})


def dense_model(activation: str = "swiglu") -> Decoder:
    config = config_of({"kind": "dense", "hidden_dim": 40, "activation": activation})
    return materialize(lambda: Decoder(config), torch.device("cpu"), seed=1)


def mixture_of(**changes: Any) -> ModelConfig:
    ffn = {"kind": "moe", "num_experts": 6, "top_k": 2, "expert_dim": 40, **changes}
    return config_of(ffn)


def upcycled(dense: Decoder, config: ModelConfig, noise: float = 0.0, seed: int = 3) -> Decoder:
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=2)
    load_weights(model, Upcycled(Held(dense), config, noise, seed))
    return model


def loss(model: Decoder, training: bool) -> float:
    tokens = torch.randint(0, 97, (2, 34), generator=torch.Generator().manual_seed(0))
    counted = torch.ones(2, 33, dtype=torch.bool)
    output = model.train(training)(tokens[:, :-1], tokens[:, 1:], counted, clock=Clock(1, 66, seed=0))
    return float(output.nll.detach()) / counted.numel()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: "-".join(map(str, router.values())))
def test_the_loss_is_the_dense_models_or_the_router_is_refused(router: dict[str, Any], training: bool) -> None:
    dense, config = dense_model(), mixture_of(router=router)
    assert isinstance(config.ffn, MoEConfig)
    assert isinstance(dense.config.ffn, DenseConfig)
    difference = abs(loss(upcycled(dense, config), training) - loss(dense, training))
    problem = upcycling_problem(dense.config.ffn, config.ffn)
    if problem is None:
        assert difference < 1e-5
    else:
        assert difference > 1e-3
        assert problem.startswith("model.ffn.router.")


@pytest.mark.parametrize("activation", ["relu2", "poly_norm", "geglu"])
def test_any_activation_is_copied(activation: str) -> None:
    dense = dense_model(activation)
    with torch.no_grad():
        for block in dense.blocks:
            if block.ffn.coefficients is not None:
                block.ffn.coefficients.add_(torch.randn(4))
    model = upcycled(dense, mixture_of(activation=activation))
    assert loss(model, training=False) == pytest.approx(loss(dense, training=False), abs=1e-5)


def test_noise_makes_copies_differ_by_as_much_and_by_name_alone() -> None:
    dense, config = dense_model(), mixture_of()
    weights = Upcycled(Held(dense), config, 0.1, seed=3)
    w2 = weights.read("blocks.1.ffn.experts.w2")
    added = w2 - dense.state_dict()["blocks.1.ffn.w2.weight"]
    std = float(dense.state_dict()["blocks.1.ffn.w2.weight"].std())
    torch.testing.assert_close(added.std(dim=(1, 2)), torch.full((6,), 0.1 * std), rtol=0.1, atol=0)
    assert torch.corrcoef(added.flatten(1)).fill_diagonal_(0).abs().max() < 0.15
    assert torch.equal(weights.read("blocks.1.ffn.experts.w2", slice(2, 4)), w2[2:4])  # what a rank with two reads
    assert torch.equal(weights.read("blocks.1.attention.wq.weight"), dense.state_dict()["blocks.1.attention.wq.weight"])
    other = Upcycled(Held(dense), config, 0.1, seed=4).read("blocks.1.ffn.experts.w2")
    assert not torch.equal(other, w2)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"expert_dim": 48}, "model.ffn.expert_dim=48 is not the dense hidden_dim=40; make them equal"),
        ({"activation": "geglu"}, "model.ffn.activation=geglu is not the dense model's swiglu"),
        ({"shared": {"num": 2}}, "model.ffn.shared.num=2 adds to experts"),
        ({"num_experts": 2, "sizes": [{"num": 1, "times": 1}, {"num": 1, "times": 2}]}, "model.ffn.sizes makes"),
        ({"router": {"kind": "softmax_top_k", "renormalize": False}}, "renormalize=False: .* set it to true"),
        ({"router": {"kind": "sigmoid_top_k", "scale": 2.5}}, "scale=2.5: .* set it to 1"),
        ({"router": {"kind": "relu"}}, "kind=relu: .* such as softmax_top_k"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, Any], problem: str) -> None:
    config = mixture_of(**changes)
    assert isinstance(config.ffn, MoEConfig)
    found = upcycling_problem(DenseConfig(hidden_dim=40), config.ffn)
    assert found is not None
    assert re.search(problem, found), found
