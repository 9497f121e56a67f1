"""Learning to recall: what learns it, what cannot, and that the loss and the score are of the questions alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tidegate.data.recall import recall_batch
from tidegate.model.balance import BalanceConfig
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.train import recall
from tidegate.train.recall import Learned, RecallTask, Score, learn_recall, learned, reading

TINY = RecallTask(length=16, pairs=3, vocab_size=32)
EXPERTS = {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 16}


def stack(**changes: Any) -> ModelConfig:
    """Two blocks that attend; the vocabulary is of text."""
    fields: dict[str, Any] = {
        "vocab_size": 1000,
        "width": 64,
        "num_layers": 2,
        "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "gate": {"kind": "none"}},
        "ffn": {"kind": "dense", "hidden_dim": 64},
    }
    return ModelConfig.model_validate(fields | changes)


@pytest.fixture(autouse=True)
def _numerics(poisoned_memory: None, seeded_single_thread: None) -> None:
    pass


def scores(model: ModelConfig, steps: int, seed: int = 0) -> list[Score]:
    return list(learn_recall(model, BalanceConfig(), TINY, steps, 1e-3, seed))


@pytest.mark.slow
def test_attention_learns_it_and_a_model_that_sees_no_other_token_does_not() -> None:
    sees_all = learned(learn_recall(stack(), BalanceConfig(), TINY, 300, 1e-3, 0))
    assert reading(sees_all.accuracy, TINY) == "recalls"
    assert sees_all.reached
    sees_itself = stack(mixers={"own": {"kind": "sliding_window", "window": 1}}, layers="own")
    (blind,) = scores(sees_itself, 100)
    assert reading(blind.accuracy, TINY) == "no recall across tokens"


def test_a_seed_repeats_and_another_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_EVERY", 5)
    first = scores(stack(), 12)
    assert [score.step for score in first] == [5, 10, 12]
    assert scores(stack(), 12) == first
    assert scores(stack(), 12, seed=1) != first


@pytest.mark.parametrize("ffn", [{"kind": "dense", "hidden_dim": 64}, EXPERTS])
def test_the_loss_is_of_the_questions_and_routing_of_all_tokens(ffn: dict[str, Any]) -> None:
    config = stack(ffn=ffn, vocab_size=TINY.vocab_size)
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)
    batch = recall_batch(5, *TINY, torch.Generator().manual_seed(1))
    everything = torch.ones_like(batch.counted_BT)
    logits_NV = model.logits(batch.tokens_BT, everything, batch.counted_BT)
    places = [model.logits(batch.tokens_BT, everything, place) for place in range(TINY.length)]
    assert logits_NV.equal(torch.stack(places, dim=1)[batch.counted_BT])
    loss = F.cross_entropy(logits_NV, batch.labels_BT[batch.counted_BT])
    balancer = None
    if ffn is EXPERTS:
        balancer = recall.Balancer(BalanceConfig(), lambda _: None, 1, 1, config.ffn)
        stats = model(batch.tokens_BT, batch.tokens_BT, everything).stats
        added = recall.Balancer(BalanceConfig(), lambda _: None, 1, 1, config.ffn)
        added.begin_step()
        loss = loss + added.losses(stats, torch.full((5,), 16.0), torch.tensor(80.0)).total
    found = recall._loss(model, balancer, batch, Clock(1, 80, 0))
    torch.testing.assert_close(found, loss)
    if balancer is not None:
        assert balancer.step_counts().sum(dim=1).tolist() == [2 * 80, 2 * 80]


def test_experts_and_hash_routers_take_part() -> None:
    for router in ({"kind": "softmax_top_k"}, {"kind": "hash"}):
        (score,) = scores(stack(ffn=EXPERTS | {"router": router}), 3)
        assert (score.step, 0 <= score.accuracy <= 1) == (3, True)


def test_what_is_enough_is_not_trained_on() -> None:
    curve = iter([Score(100, 0.5), Score(200, 0.4), Score(300, 0.995), Score(400, 1.0)])
    assert learned(curve) == Learned(0.995, 300)
    assert next(curve).step == 400
    assert learned([Score(100, 0.5), Score(200, 0.4)]) == Learned(0.5, None)


@pytest.mark.parametrize(
    ("accuracy", "pairs", "says"),
    [
        (1 / 64, 6, "no recall across tokens"),
        (0.04, 6, "no recall across tokens"),
        (0.1, 6, "knows which values there are, not which is asked for"),
        (0.19, 6, "knows which values there are, not which is asked for"),
        (0.6, 6, "recalls a part"),
        (0.98, 6, "recalls a part"),
        (0.99, 6, "recalls"),
        (0.5, 2, "knows which values there are, not which is asked for"),
        (0.9, 2, "recalls a part"),
        (1.0, 1, "recalls"),
    ],
)
def test_readings(accuracy: float, pairs: int, says: str) -> None:
    assert reading(accuracy, RecallTask(48, pairs, 128)) == says


def test_every_sequence_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    loss = recall._loss
    monkeypatch.setattr(recall, "_loss", lambda *arguments: seen.append(arguments[2].tokens_BT) or loss(*arguments))
    scores(stack(), 3)
    scores(stack(), 3, seed=1)
    assert all(not one.equal(other) for one, other in itertools.combinations(seen, 2))
