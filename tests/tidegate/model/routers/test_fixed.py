"""Routers that learn nothing: hash, random, THOR, round-robin.

Letters: N rows, E experts, K chosen experts, V vocabulary, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.routers import Routing
from tidegate.model.routers.fixed import HashConfig, RandomConfig, RoundRobinConfig, ThorConfig
from tidegate_kernels.gated_attention import Documents

VOCAB = 32_000


def zipf(vocab: int = VOCAB) -> torch.Tensor:
    frequencies = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    shuffled = frequencies[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))]
    return shuffled / shuffled.sum()


def hash_router(build: Callable[..., Any], by: Any, num_experts: int, top_k: int = 1, vocab: int = VOCAB) -> Any:
    router = build(HashConfig(by=by), num_experts, top_k, vocab_size=vocab)
    router.fit_tokens(zipf(vocab))
    return router


# --- hash


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (16, 1), (64, 1), (7, 3), (8, 8)])
def test_balanced_tables_reach_the_limit_of_the_most_frequent_id(
    num_experts: int, top_k: int, build: Callable[..., Any]
) -> None:
    frequencies = zipf()
    table = hash_router(build, "balanced", num_experts, top_k).table_VK
    loads = torch.zeros(num_experts, dtype=torch.float64)
    loads.scatter_add_(0, table.flatten(), frequencies.repeat_interleave(top_k))
    limit = max(1.0, num_experts * float(frequencies.max()) / top_k)
    assert 1.0 <= float(loads.max() / loads.mean()) < 1.01 * limit
    if top_k == 1:
        by_chance = hash_router(build, "random", num_experts).table_VK
        chance = torch.zeros(num_experts, dtype=torch.float64).scatter_add_(0, by_chance.flatten(), frequencies)
        assert chance.max() > 1.05 * loads.max()


@pytest.mark.parametrize("by", ["random", "balanced", "bigram"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 3), (8, 8)])
def test_experts_of_an_id_are_distinct_and_nothing_is_learned(
    num_experts: int, top_k: int, by: Any, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    router = hash_router(build, by, num_experts, top_k, vocab=101)
    assert list(router.parameters()) == []
    routing = router(torch.randn(63, 24), context(7, 9, tokens_BT=torch.randint(0, 101, (7, 9))))
    chosen = routing.experts_NS.sort(dim=1).values
    assert chosen.min() >= 0
    assert chosen.max() < num_experts
    assert (chosen.diff(dim=1) > 0).all()
    assert torch.equal(routing.weights_NS, torch.full((63, top_k), 1 / top_k))


@pytest.mark.parametrize("by", ["random", "balanced"])
def test_an_id_has_the_same_experts_wherever_and_whenever_it_stands(
    by: Any, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    ids = torch.randint(0, VOCAB, (6, 10))
    router = hash_router(build, by, 7, 2)
    experts = router(torch.randn(60, 24), context(6, 10, tokens_BT=ids)).experts_NS
    # Another rank and step: other sequences beside it, other places, another clock, another seed of the run.
    elsewhere = context(3, 10, tokens_BT=ids[3:], sequences_B=torch.tensor([90, 91, 92]), step=77, seed=5)
    assert torch.equal(router(torch.randn(30, 24), elsewhere).experts_NS, experts[30:])
    packed = context(1, 60, tokens_BT=ids.view(1, 60))
    assert torch.equal(router(torch.randn(60, 24), packed).experts_NS, experts)
    # A restart: a fresh router, its state from the checkpoint, and no second look at the text.
    restarted = build(HashConfig(by=by), 7, 2, vocab_size=VOCAB, seed=3)
    restarted.load_state_dict(router.state_dict())
    assert torch.equal(restarted.eval()(torch.randn(60, 24), context(6, 10, tokens_BT=ids)).experts_NS, experts)


def test_layers_hash_differently(build: Callable[..., Any]) -> None:
    first, second = (build(HashConfig(by="random"), 8, 1, vocab_size=VOCAB, layer=layer).table_VK for layer in (0, 1))
    assert float((first == second).float().mean()) == pytest.approx(1 / 8, abs=0.01)


def test_random_tables_are_even_over_ids_and_balanced_ones_differ(build: Callable[..., Any]) -> None:
    by_chance = hash_router(build, "random", 8).table_VK
    counts = torch.bincount(by_chance.flatten(), minlength=8)
    assert (counts - VOCAB / 8).abs().max() < 4 * (VOCAB / 8 * 7 / 8) ** 0.5
    assert (hash_router(build, "balanced", 8).table_VK != by_chance).float().mean() > 0.5


def test_ids_that_were_never_seen_are_spread_too(build: Callable[..., Any]) -> None:
    router = build(HashConfig(), 8, 1, vocab_size=1100)
    frequencies = torch.zeros(1000)
    frequencies[:10] = 0.1
    router.fit_tokens(frequencies)
    counts = torch.bincount(router.table_VK[10:1000].flatten(), minlength=8)
    assert counts.sort().values.tolist() == [0, 0] + [165] * 6, "evenly onto the six experts with one frequent id"
    spare = torch.bincount(router.table_VK[1000:].flatten(), minlength=8)
    assert (spare > 0).all(), "ids beyond the tokenizer's keep their hash"


def test_a_bigram_splits_a_frequent_id(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router = build(HashConfig(by="bigram"), 64, 1, vocab_size=VOCAB)
    previous = torch.randint(0, VOCAB, (1, 10_000))
    ids = torch.stack([previous, torch.full_like(previous, 17)], dim=-1).view(1, -1)  # every other token is id 17
    experts = router(torch.zeros(20_000, 24), context(1, 20_000, tokens_BT=ids)).experts_NS[1::2]
    loads = torch.bincount(experts.flatten(), minlength=64).float()
    assert loads.max() / loads.mean() < 1.4  # Poisson of 156: 4 deviations are 32 %
    again = router(torch.zeros(20_000, 24), context(1, 20_000, tokens_BT=ids, step=9, seed=4)).experts_NS[1::2]
    assert torch.equal(again, experts)


def test_a_bigram_does_not_cross_a_document(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    """A document routes the same at the start of a sequence and packed behind another one."""
    router = build(HashConfig(by="bigram"), 64, 2, vocab_size=VOCAB)
    first, second = torch.randint(0, VOCAB, (1, 9)), torch.randint(0, VOCAB, (1, 11))
    alone = router(torch.zeros(11, 24), context(1, 11, tokens_BT=second)).experts_NS
    ids, documents = torch.cat([first, second], dim=1), torch.tensor([[0] * 9 + [1] * 11])
    packed = router(torch.zeros(20, 24), context(1, 20, tokens_BT=ids, documents=Documents(documents))).experts_NS
    assert torch.equal(packed[9:], alone)
    one_text = router(torch.zeros(20, 24), context(1, 20, tokens_BT=ids)).experts_NS
    assert torch.equal(one_text[10:], alone[1:])
    assert not torch.equal(one_text[9], alone[0])


# --- random and round-robin


@pytest.mark.parametrize("config", [RandomConfig(), ThorConfig()], ids=["random", "thor"])
def test_random_draws_are_uniform_distinct_and_new_every_step(
    config: Any, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    router = build(config)
    batch = context(20, 1000)
    experts = router(torch.zeros(20_000, 24), batch).experts_NS
    assert (experts.sort(dim=1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(experts.flatten(), minlength=7)
    expected, deviation = 20_000 * 3 / 7, (20_000 * 3 / 7 * 4 / 7) ** 0.5
    assert (counts - expected).abs().max() < 4 * deviation
    assert torch.equal(router(torch.zeros(20_000, 24), batch).experts_NS, experts)
    for other in (context(20, 1000, step=2), context(20, 1000, seed=1)):
        assert (router(torch.zeros(20_000, 24), other).experts_NS != experts).any(dim=1).float().mean() > 0.8
    other_layer = build(config, layer=1)(torch.zeros(20_000, 24), batch).experts_NS
    assert (other_layer != experts).any(dim=1).float().mean() > 0.8


def test_draws_follow_the_sequence_and_not_the_rank(build: Callable[..., Any], context: Callable[..., Any]) -> None:
    router = build(RandomConfig())
    whole = router(torch.zeros(63, 24), context(7, 9)).experts_NS.view(7, 9, 3)
    part = context(2, 9, sequences_B=torch.tensor([5, 2]))
    assert torch.equal(router(torch.zeros(18, 24), part).experts_NS.view(2, 9, 3), whole[[5, 2]])


@pytest.mark.parametrize("config", [RandomConfig(per="sequence"), ThorConfig(per="sequence")], ids=["random", "thor"])
def test_a_sequence_can_share_one_draw(config: Any, build: Callable[..., Any], context: Callable[..., Any]) -> None:
    experts = build(config)(torch.zeros(5000, 24), context(500, 10)).experts_NS.view(500, 10, 3)
    assert (experts == experts[:, :1]).all()
    counts = torch.bincount(experts[:, 0].flatten(), minlength=7)
    assert (counts - 500 * 3 / 7).abs().max() < 4 * (500 * 3 / 7 * 4 / 7) ** 0.5


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 3), (8, 8)])
def test_round_robin_is_perfectly_balanced(
    num_experts: int, top_k: int, build: Callable[..., Any], context: Callable[..., Any]
) -> None:
    experts = build(RoundRobinConfig(), num_experts, top_k)(torch.zeros(63, 24), context(7, 9)).experts_NS
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    assert counts.max() - counts.min() <= 1
    assert (experts.sort(dim=1).values.diff(dim=1) > 0).all()


# --- THOR: two passes and their consistency


def thor_model(model_config: Callable[..., ModelConfig], **router: Any) -> Decoder:
    ffn = {"kind": "moe", "num_experts": 7, "top_k": 1, "expert_dim": 8, "router": {"kind": "thor", **router}}
    return materialize(lambda: Decoder(model_config(ffn=ffn, init_std=0.3)), torch.device("cpu"), seed=0)


def thor_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 101, (3, 10))
    return tokens[:, :-1], tokens[:, 1:], torch.rand(3, 9) < 0.7


def test_consistency_is_the_formula_of_the_paper(
    model_config: Callable[..., ModelConfig], last_norm: Callable[[Decoder], list[Any]]
) -> None:
    model = thor_model(model_config, consistency=3.0)
    seen = last_norm(model)
    tokens, labels, counted = thor_batch()
    output = model(tokens, labels, counted, clock=Clock(4, 400, 0))
    passes = [normalised.detach().double() for normalised, _ in seen]
    assert len(passes) == 2
    one, other = ((h @ model.head.weight.detach().double().T).log_softmax(-1) for h in passes)
    assert not torch.allclose(one, other, atol=1e-2), "the passes draw different experts"
    nll = -sum(p.gather(-1, labels[..., None]).squeeze(-1) for p in (one, other)) / 2
    torch.testing.assert_close(output.nll_B.double(), (nll * counted).sum(1), rtol=1e-5, atol=1e-5)
    p, q = one.exp(), other.exp()
    kl = ((p * (one - other)).sum(-1) + (q * (other - one)).sum(-1)) / 2
    torch.testing.assert_close(
        output.stats.penalty_sums_B.sum(0).double(), 3.0 / 2 * (kl * counted).sum(1), rtol=1e-4, atol=1e-6
    )
    assert output.stats.counts_BE.sum() == counted.sum() * 2  # layers; two passes count as one
    output.stats.penalty_sums_B.sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_evaluation_is_one_pass_and_deterministic(
    model_config: Callable[..., ModelConfig], last_norm: Callable[[Decoder], list[Any]]
) -> None:
    model = thor_model(model_config).eval()
    passes = last_norm(model)
    batch = thor_batch()
    with torch.no_grad():
        one, other = model(*batch), model(*batch)
    assert len(passes) == 2
    assert torch.equal(one.nll_B, other.nll_B)
    assert not one.stats.penalty_sums_B.any()


def spread_between_experts(
    model_config: Callable[..., ModelConfig], last_norm: Callable[[Decoder], list[Any]], consistency: float
) -> tuple[float, list[float]]:
    """After training: mean KL between the predictions of single experts (nats), and the loss (nats a token) of two
    draws of the routing."""
    torch.manual_seed(0)
    ffn = {
        "kind": "moe",
        "num_experts": 3,
        "top_k": 1,
        "expert_dim": 16,
        "router": {"kind": "thor", "consistency": consistency},
    }
    config = model_config(ffn=ffn, init_std=0.3, num_layers=1, vocab_size=17)
    model = materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)
    chain = (3 * torch.randn(17, 17)).softmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def text() -> torch.Tensor:
        columns = [torch.randint(0, 17, (16,))]
        for _ in range(16):
            columns.append(torch.multinomial(chain[columns[-1]], 1).squeeze(1))
        return torch.stack(columns, dim=1)

    counted = torch.ones(16, 16, dtype=torch.bool)
    for step in range(1, 101):
        tokens = text()
        output = model(tokens[:, :-1], tokens[:, 1:], counted, clock=Clock(step, step, 0))
        optimizer.zero_grad()
        ((output.nll + output.stats.penalty_sums_B.sum()) / 256).backward()
        optimizer.step()
    model.eval()
    tokens = text()
    batch = (tokens[:, :-1], tokens[:, 1:], counted)
    with torch.no_grad():
        losses = [float(model(*batch, clock=Clock(1, 1, seed)).nll / 256) for seed in (1, 2)]
        seen = last_norm(model)
        for expert in range(3):
            even = torch.full((256, 3), 1 / 3)
            single = Routing(torch.full((256, 1), expert), torch.ones(256, 1), even, torch.zeros(256, 3))
            hook = model.routers()[0].register_forward_hook(lambda *_, single=single: single)
            model(*batch)
            hook.remove()
    logs = torch.stack([normalised @ model.head.weight.detach().T for normalised, _ in seen]).log_softmax(-1)
    pairs = [(logs[i].exp() * (logs[i] - logs[j])).sum(-1).mean() for i in range(3) for j in range(3) if i != j]
    return float(torch.stack(pairs).mean()), losses


def test_consistency_makes_experts_predict_alike(
    model_config: Callable[..., ModelConfig], last_norm: Callable[[Decoder], list[Any]]
) -> None:
    without, _ = spread_between_experts(model_config, last_norm, 0.0)
    consistent, losses = spread_between_experts(model_config, last_norm, 5.0)
    assert consistent < without / 3
    assert losses[0] < torch.tensor(17.0).log() - 0.3, "it learned"
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02), "which experts are drawn hardly matters"
