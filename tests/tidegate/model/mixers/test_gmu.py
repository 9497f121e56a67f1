"""Gated Memory Units: by hand, and across the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.initialisation import Draw
from tidegate.model.mixers import GMUConfig, Place

B, T, D, C = 2, 12, 16, 20
KDA = {"kind": "kda", "num_heads": 2, "key_dim": 6, "value_dim": 10}
GLA = {"kind": "gla", "num_heads": 3, "key_dim": 4, "value_dim": 8}
CPU = torch.device("cpu")


def test_by_hand() -> None:
    """SambaY's equation with the norm behind the product; with a memory of ones it is a gated linear layer."""
    unit = GMUConfig().build(Place(D, 1e-6, 0.3, 0.2), C)
    for name, module in unit.named_modules():
        if module is not unit and hasattr(module, "init_weights"):
            module.init_weights(Draw(0, name))
    x, memory = torch.randn(B, T, D), torch.randn(B, T, C)
    for each in (memory, torch.ones_like(memory)):
        product = each * F.silu(x @ unit.w_gate.weight.T)
        normed = product * (product.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        torch.testing.assert_close(unit(x, each), normed @ unit.w_out.weight.T)


def model(layers: str, model_config: Callable[..., ModelConfig], recompute: bool = False) -> Decoder:
    mixers = {"kda": KDA, "gla": GLA, "unit": {"kind": "gmu"}}
    used = {name: mixer for name, mixer in mixers.items() if name in layers}
    config = model_config(num_layers=layers.count(",") + 1, layers=layers, mixers=used, init_std=0.3)
    return materialize(lambda: Decoder(config, recompute=recompute), CPU, seed=1)


def test_a_unit_reads_the_nearest_linear_mixer_before_it(model_config: Callable[..., ModelConfig]) -> None:
    decoder = model("gla, unit, kda, attention, unit, unit", model_config)
    assert decoder.config.publishing == {0, 2}
    read = [block.mixer.w_gate.weight.shape[0] for i, block in enumerate(decoder.blocks) if i in (1, 4, 5)]
    assert read == [3 * 8, 2 * 10, 2 * 10]
    seen: dict[int, torch.Tensor] = {}
    published: dict[int, torch.Tensor] = {}
    for place, block in enumerate(decoder.blocks):
        if place in (0, 2):
            block.mixer.register_forward_hook(lambda _, __, out, at=place: published.update({at: out.memory_BTC}))
        elif place != 3:
            block.mixer.register_forward_hook(lambda _, given, __, at=place: seen.update({at: given[1]}))
    tokens = torch.randint(101, (B, T))
    decoder(tokens, tokens, torch.ones(B, T, dtype=torch.bool))
    assert seen[1] is published[0]
    assert seen[4] is seen[5] is published[2]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_the_publisher_from_every_reader(
    recompute: bool, model_config: Callable[..., ModelConfig]
) -> None:
    """By finite differences in fp64, along the gradient, of all that the publisher's memory is made of."""
    decoder = model("kda, attention, unit, unit", model_config, recompute).double()
    tokens, labels = torch.randint(101, (2, B, T)).unbind()
    counted = torch.ones(B, T, dtype=torch.bool)

    def loss() -> torch.Tensor:
        nll: torch.Tensor = decoder(tokens, labels, counted).nll
        return nll

    loss().backward()
    weight = decoder.blocks[0].mixer.w_in.weight
    direction = weight.grad / weight.grad.norm()
    step = 1e-5
    with torch.no_grad():
        before = weight.clone()
        values = []
        for sign in (1, -1):
            weight.copy_(before + sign * step * direction)
            values.append(float(loss()))
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(weight.grad.norm()), rel=1e-3)


def test_later_tokens_have_no_say(model_config: Callable[..., ModelConfig]) -> None:
    decoder = model("kda, attention, unit", model_config)
    tokens = torch.randint(101, (B, T))
    other, counted = tokens.clone(), torch.ones(B, T, dtype=torch.bool)
    other[:, 7:] = (other[:, 7:] + 1) % 101
    one, two = (decoder(each, tokens, counted).nll_BT[:, :7] for each in (tokens, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
