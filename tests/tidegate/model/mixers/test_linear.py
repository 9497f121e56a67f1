"""Linear mixers: cause before effect, documents apart, a state that goes on, and recall that is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tidegate.model.balance import BalanceConfig
from tidegate.model.decoder import ModelConfig
from tidegate.model.initialisation import Draw
from tidegate.model.mixers import (
    GatedDeltaNetConfig,
    GLAConfig,
    HGRN2Config,
    KDAConfig,
    LinearMixer,
    MixerState,
    Place,
    ScalarGatedConfig,
)
from tidegate.train.recall import RecallTask, learn_recall, learned
from tidegate_kernels.gated_attention import Documents

HEADS: dict[str, Any] = {"num_heads": 2, "key_dim": 8, "value_dim": 12}
KINDS = {
    "kda": KDAConfig(**HEADS),
    "kda unbounded": KDAConfig(**HEADS, bound=None),
    "gdn": GatedDeltaNetConfig(**HEADS),
    "gla": GLAConfig(**HEADS),
    "gla plain": GLAConfig(**HEADS, conv=0),
    "hgrn2": HGRN2Config(**HEADS),
    "scalar": ScalarGatedConfig(**HEADS),
    "mlstm": ScalarGatedConfig(**HEADS, input_gate=True),
    "retnet": ScalarGatedConfig(**HEADS, decay="fixed", conv=0),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
D = 24


def filled(module: nn.Module, seed: int = 0) -> Any:
    for name, part in module.named_modules():
        if hasattr(part, "init_weights"):
            part.init_weights(Draw(seed, name))
    return module


def mixer_of(config: Any, std: float = 0.3) -> LinearMixer:
    """Of a layer in the middle, with gates that are not all about half open."""
    return filled(config.build(Place(D, 1e-6, std, std, layer=1, num_layers=3)))


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None, seeded_single_thread: None) -> None:
    """What is not initialised is NaN."""


@every_kind
def test_no_token_sees_a_later_one(config: Any) -> None:
    mixer, x = mixer_of(config), torch.randn(2, 40, D)
    y = mixer(x).y_BTD
    assert y.isfinite().all()
    for cut in (1, 16, 39):
        other = torch.cat([x[:, :cut], torch.randn(2, 40 - cut, D)], dim=1)
        found = mixer(other).y_BTD
        torch.testing.assert_close(found[:, :cut], y[:, :cut], rtol=0, atol=1e-6)
        assert not torch.allclose(found[:, cut], y[:, cut])


@every_kind
def test_documents_are_apart(config: Any) -> None:
    mixer, x = mixer_of(config), torch.randn(1, 45, D, requires_grad=True)
    begins = [0, 2, 3, 20]
    ids = torch.tensor([[sum(place >= begin for begin in begins) for place in range(45)]])
    y, state, _ = mixer(x, Documents(ids))
    for begin, end in zip(begins, [*begins[1:], 45], strict=True):
        alone = mixer(x[:, begin:end])
        torch.testing.assert_close(y[:, begin:end], alone.y_BTD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.memory_BHKV, alone.state.memory_BHKV, rtol=1e-4, atol=1e-5)
    if state.last_BWC is not None:
        torch.testing.assert_close(state.last_BWC, alone.state.last_BWC)
    (gradient,) = torch.autograd.grad(y[:, 20:].sum(), x)
    assert gradient[:, :20].eq(0).all()
    assert gradient[:, 20:].abs().sum(dim=-1).gt(0).all()


@every_kind
@pytest.mark.parametrize("parts", [[20, 20], [1, 2, 37], [1] * 40], ids=["halves", "short", "a token at a time"])
def test_a_state_goes_on(config: Any, parts: list[int]) -> None:
    """Also from documents that end in the part before, one of which is shorter than the convolution."""
    mixer, x = mixer_of(config), torch.randn(2, 40, D)
    ids = torch.stack([torch.arange(40) // 18, torch.arange(40) // 19])
    for documents in (None, ids):
        whole = mixer(x, None if documents is None else Documents(documents)).y_BTD
        state: MixerState | None = None
        found, begin, last = [], 0, None
        for length in parts:
            part = None if documents is None else documents[:, begin : begin + length]
            if part is not None and state is not None and last is not None:
                new_B = part[:, 0] != last  # a document that begins with a part has nothing to go on from
                empty = [None if x is None else torch.where(new_B.view(-1, *[1] * (x.ndim - 1)), 0, x) for x in state]
                state = MixerState(*empty)  # type: ignore[arg-type]
            y, state, _ = mixer(x[:, begin : begin + length], None if part is None else Documents(part), state)
            found.append(y)
            begin, last = begin + length, None if part is None else part[:, -1]
        torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-5)


@every_kind
def test_it_is_built_on_meta_and_runs_in_bf16(config: Any) -> None:
    with torch.device("meta"):
        place = Place(D, 1e-6, 0.02, 0.02)
        mixer = config.build(place)
    assert mixer.to_empty(device="cpu") is mixer
    filled(mixer)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())
    x = torch.randn(2, 33, D)
    y, state, _ = mixer.bfloat16()(x.bfloat16())
    assert (y.dtype, state.memory_BHKV.dtype) == (torch.bfloat16, torch.float32)
    y.float().pow(2).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in mixer.parameters())
    conv = 2 * 3 * mixer.config.channels if mixer.config.conv else 0
    assert mixer.config.state_bytes() == 4 * 2 * 8 * 12 + conv
    kept = [state.memory_BHKV] + ([state.last_BWC] if state.last_BWC is not None else [])
    assert sum(each[0].numel() * each.element_size() for each in kept) == mixer.config.state_bytes()


def test_gated_delta_net_is_kda_with_equal_decays() -> None:
    gdn, kda = mixer_of(KINDS["gdn"]), mixer_of(KINDS["kda unbounded"])
    x = torch.randn(2, 50, D)
    q, k = torch.randn(2, 2, 50, 2, 8).unbind()
    one, many = gdn.rule(x, q, k), kda.rule(x, q, k)
    assert one.log_decay_BTHk.shape == (2, 50, 2, 1)
    assert many.log_decay_BTHk.shape == (2, 50, 2, 8)
    assert one.q_BTHK.equal(many.q_BTHK)
    torch.testing.assert_close(one.k_BTHK.norm(dim=-1), torch.ones(2, 50, 2))


def test_gates_begin_as_their_papers_say() -> None:
    x, q = torch.randn(4, 64, D), torch.randn(4, 64, 2, 8)

    def decays(config: Any) -> torch.Tensor:
        return mixer_of(config, std=0.02).rule(x, q, q).log_decay_BTHk.exp().flatten(0, 1)

    assert decays(KINDS["gla"]).sub(0.5 ** (1 / 16)).abs().max() < 0.01
    assert decays(KINDS["hgrn2"]).sub(1 / 3 + 2 / 3 / 2).abs().max() < 0.1
    assert decays(KINDS["retnet"])[0].flatten().tolist() == pytest.approx([1 - 2**-5, 1 - 2**-6])
    assert decays(KINDS["scalar"]).amin() > 0.9
    for name in ("kda", "kda unbounded", "gdn"):
        assert 0.15 < decays(KINDS[name]).amin() <= decays(KINDS[name]).amax() <= 1
    assert decays(KINDS["kda"]).amin() > torch.tensor(-5.0).exp()


def recall_of(config: Any, steps: int) -> float:
    """Best accuracy of two blocks of the mixer with a small feed-forward."""
    fields = {
        "vocab_size": 128,
        "width": 64,
        "num_layers": 2,
        "mixers": {"linear": config},
        "layers": "linear",
        "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 64},
        "ffn": {"kind": "dense", "hidden_dim": 64},
    }
    model = ModelConfig.model_validate(fields)
    return learned(learn_recall(model, BalanceConfig(), RecallTask(), steps, 3e-3, seed=0)).accuracy


WIDE: dict[str, Any] = {"num_heads": 2, "key_dim": 32, "value_dim": 32}


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(KDAConfig(**WIDE), marks=pytest.mark.long), ScalarGatedConfig(**WIDE)])
def test_two_layers_learn_to_recall(config: Any) -> None:
    assert recall_of(config, 1000) >= 0.99


@pytest.mark.slow
def test_without_a_convolution_keys_are_not_bound_to_values() -> None:
    """It learns which values there are, one in six of which is right, and no more (chance is 1 in 64)."""
    assert 0.1 < recall_of(ScalarGatedConfig(**WIDE, conv=0), 300) < 0.3
