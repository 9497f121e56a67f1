"""Self-tuning: nothing at the beginning, a response that is learned, and the optimum where it is known."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tidegate.cli import train as command
from tidegate.config import ConfigError, load
from tidegate.model.clock import STILL, Clock
from tidegate.model.decoder import Decoder, ModelConfig
from tidegate.model.initialisation import Draw
from tidegate.model.routers import RouterContext, RouterShape, SoftmaxTopKConfig
from tidegate.model.self_tuning import BestResponse, SelfTuneConfig, Tuned
from tidegate.train.job import Job

TOY = Path(__file__).resolve().parents[3] / "docs" / "self_tuning_toy.py"
ALL = {"balance_scale": 1.0, "temperature": 1.0, "noise": 0.2, "dropout": 0.3}


def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location(TOY.stem, TOY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuned_model(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 61,
            "width": 16,
            "num_layers": 2,
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": 3, "top_k": 2, "expert_dim": 24, "shared": {"num": 1}},
            "init_std": 0.2,
            **fields,
        }
    )


def made(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    model.init_weights(0)
    return model


def score_of(model: Decoder, clock: Clock = STILL) -> float:
    """In a training step if there is a clock, else in evaluation."""
    model.train(clock.step > 0)
    tokens = torch.arange(3 * 18).view(3, 18) * 7 % 61
    return float(model(tokens[:, :-1], tokens[:, 1:], torch.ones(3, 17, dtype=torch.bool), clock=clock).nll.detach())


def response(num: int = 2, spread: float = 0.5) -> BestResponse:
    new = BestResponse([0.3, -1.0][:num], {"units": (5, 7)}, spread, 2.0, 0.01, 1e-3)
    new.init_weights(Draw(0, "response"))
    return new


def test_a_new_model_is_the_one_without_self_tuning() -> None:
    tuned = tuned_model(self_tune={"tuned": ALL})
    assert score_of(made(tuned)) == score_of(made(tuned_model()))
    step = Clock(1, 1, 0)
    assert score_of(made(tuned), step) != score_of(made(tuned_model()), step)


@pytest.mark.parametrize("ffn", [{}, {"ffn": {"kind": "dense", "hidden_dim": 23}}])
def test_every_hidden_unit_of_every_feed_forward_has_a_gate(ffn: dict[str, Any]) -> None:
    model = made(tuned_model(self_tune={"tuned": {"dropout": 0.1}}, **ffn))
    assert model.self_tuning is not None
    shapes = {name: tuple(v.shape) for name, v in model.self_tuning.response.items()}
    dense, moe = {"channels": (2, 23, 2)}, {"expert_channels": (2, 3, 24, 2), "channels": (2, 24, 2)}
    assert shapes == (dense if ffn else moe)
    before = score_of(model)
    for parameter in model.self_tuning.response.values():
        for layer in range(2):
            with torch.no_grad():
                parameter[layer] += 0.3
            assert score_of(model) != before, "a layer's gates do nothing"
            with torch.no_grad():
                parameter[layer] -= 0.3


def test_a_step_perturbs_alike_everywhere_and_evaluation_not_at_all() -> None:
    tuning = response()
    points = torch.stack([tuning(Clock(step, step, 3)).point_H for step in range(1, 2001)])
    assert torch.equal(points[41], tuning(Clock(42, 9, 3)).point_H)
    assert not torch.equal(points[41], tuning(Clock(42, 42, 4)).point_H)
    torch.testing.assert_close(points.mean(dim=0), torch.tensor([0.3, -1.0]), rtol=0, atol=5 * 0.5 / 2000**0.5)
    torch.testing.assert_close(points.std(dim=0), torch.full((2,), 0.5), rtol=0.1, atol=0)
    assert abs(float(torch.corrcoef(points.T)[0, 1])) < 0.1
    tuning.eval()
    assert torch.equal(tuning(Clock(42, 42, 3)).point_H, torch.tensor([0.3, -1.0]))


def test_a_held_out_loss_moves_hyperparameters_through_the_response_alone() -> None:
    tuning, clock = response(), Clock(1, 1, 0)
    tuning.eval()
    with tuning.listening() as heard:
        flat = torch.autograd.grad(tuning(clock).gates["units"].sum(), heard)
        assert all((gradient == 0).all() for gradient in flat), "there is no response yet"
        with torch.no_grad():
            tuning.response["units"][..., 0] = 0.1
        up, spread = torch.autograd.grad(tuning(clock).gates["units"].sum(), heard)
    assert up[0] > 0
    assert up[1] == 0
    assert spread[0] != 0
    before = tuning.location.clone()
    tuning.move([up, torch.zeros(2)])
    assert torch.allclose(tuning.location, before - torch.tensor([0.01, 0.0]), atol=1e-6), (
        "Adam's first step is its rate"
    )
    assert (tuning.log_spread > math.log(0.5)).all(), "entropy widens"
    after = tuning.location.clone()
    tuning.move([torch.tensor([torch.nan, 1.0]), torch.zeros(2)])
    assert torch.equal(tuning.location, after)
    tuning.train()
    with tuning.listening() as heard:  # but training does not hear
        pass
    assert not tuning(clock).point_H.requires_grad


def test_values_are_those_of_the_job_at_the_beginning() -> None:
    config = SelfTuneConfig(tuned={"dropout": 0.25, "noise": 2.0})
    values = config.values(config.build({}).location.new_tensor(config.build({}).start))
    assert float(values.dropout) == pytest.approx(0.25)
    assert float(values.noise) == pytest.approx(2.0)
    assert values.temperature is None


def test_temperature_and_noise_act_on_a_routers_logits() -> None:
    router = SoftmaxTopKConfig().build(RouterShape(24, 7, 3, 0.5))
    router.init_weights(Draw(0, "router"))
    x_ND = torch.randn(22, 24, generator=torch.Generator().manual_seed(0))
    context = RouterContext.alone(torch.ones(2, 11, dtype=torch.bool))._replace(clock=Clock(3, 3, 0))
    plain = router(x_ND, context).logits_NE
    hot = router(x_ND, context._replace(tuned=Tuned(temperature=torch.tensor(4.0)))).logits_NE
    torch.testing.assert_close(hot, plain / 4)
    noisy = context._replace(tuned=Tuned(noise=torch.tensor(2.0)))
    noise = (router(x_ND, noisy).logits_NE - plain).detach()
    assert 1.6 < float(noise.std()) < 2.4
    assert torch.equal(router(x_ND, noisy).logits_NE - plain, noise)
    router.eval()
    assert torch.equal(router(x_ND, noisy).logits_NE, plain)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    block = Decoder(tuned_model()).blocks[0]
    y_BTD = torch.ones(4, 101, 16)
    context = RouterContext.alone(torch.ones(4, 101, dtype=torch.bool))._replace(
        tuned=Tuned(dropout=torch.tensor(0.3)), clock=Clock(5, 5, 0)
    )
    dropped = block._dropped(y_BTD, context)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    other = block._dropped(y_BTD, context._replace(clock=Clock(6, 6, 0)))
    assert not torch.equal(dropped, other)
    block.eval()
    assert torch.equal(block._dropped(y_BTD, context), y_BTD)


@pytest.mark.slow
@pytest.mark.parametrize("from_below", [True, False])
def test_the_best_penalty_of_ridge_regression_is_found_from_both_sides(from_below: bool) -> None:
    script = toy()
    data = script.problem(2)
    best = data.best_log_penalty()
    ended = script.self_tuned(data, best - 3 if from_below else best + 3)
    assert math.exp(ended.log_penalty - best) == pytest.approx(1, abs=0.1)
    assert ended.passes < 2 * script.STEPS
    assert ended.held_out_loss < 1.01 * float(data.held_out_loss(data.ridge(best)))


def test_a_job_without_text_to_tune_on_is_refused_before_a_worker_starts(
    tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ["model.self_tune={tuned: {dropout: 0.1}}", "data.eval_sequences=1000"]
    with pytest.raises(ConfigError, match=r"takes all held-out sequences of domain 'letters'"):
        command(tiny_job(), settings, local=True, state_dir=tmp_path / "state")
    assert not (tmp_path / "state" / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("{tuned: {dropout: 1.0}}", r"tuned.dropout=1.0 must begin between 0 and 1"),
        ("{tuned: {noise: 0}}", r"tuned.noise=0.0 must begin above 0"),
        ("{tuned: {top_k: 2}}", r"top_k"),
        ("{tuned: {noise: 0.1}, warmup_tokens: 6144}", r"warmup_tokens=6144 is not below train.tokens=6144"),
    ],
)
def test_what_cannot_tune_itself_is_refused(tiny_job: Callable[..., Path], setting: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(tiny_job(), Job, [f"model.self_tune={setting}"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.ffn.router.kind=thor"], r"does not fit ffn.router.kind=thor"),
        (["model.ffn.router.kind=relu"], r"temperature acts on a top-k router's logits, not on relu"),
        (["model.ffn={kind: dense, hidden_dim: 8}", "balance.bias_rate=0"], r"temperature acts on .* not on dense"),
        (["balance.loss_weight=0"], r"balance_scale is a factor of balance.loss_weight=0"),
        (["model.units={over: [heads], method: {kind: random}}"], r"both gate; use one"),
        (["parallel.offload=experts", "train.precision=bf16", "parallel.expert=1"], r"parallel.offload=experts has no"),
    ],
)
def test_what_self_tuning_does_not_fit_is_refused(
    tiny_job: Callable[..., Path], overrides: list[str], expected: str
) -> None:
    settings = ["balance.bias_rate=0", "model.self_tune={tuned: {temperature: 1.0, balance_scale: 1.0}}"]
    with pytest.raises(ConfigError, match=expected):
        load(tiny_job(), Job, [*settings, *overrides])
