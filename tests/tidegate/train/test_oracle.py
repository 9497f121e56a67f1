"""The oracle gap against trying every path by hand.

Letters: B sequences, T tokens, E experts, L layers.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from tidegate.model.decoder import Decoder, DecoderOutput, ModelConfig, materialize
from tidegate.model.moe import MoEConfig
from tidegate.model.routers import Routing
from tidegate.train.oracle import OracleLosses, oracle_losses

B, T, V, L = 3, 17, 61, 3
SIZES = [{"num": 1, "times": 2}, {"num": 1, "times": 1}, {"num": 1, "times": 0}]


def model(sizes: list[dict[str, int]] = SIZES, **router: object) -> Decoder:
    moe = {"kind": "moe", "num_experts": 3, "top_k": 1, "expert_dim": 8, "sizes": sizes}
    moe["router"] = {"kind": "softmax_top_k", "renormalize": False} | router
    config = ModelConfig.model_validate(
        {
            "vocab_size": V,
            "width": 16,
            "num_layers": L,
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            "ffn": moe,
            "init_std": 0.5,
        }
    )
    return materialize(lambda: Decoder(config), torch.device("cpu"), seed=0).eval()


class Case:
    def __init__(self, decoder: Decoder) -> None:
        generator = torch.Generator().manual_seed(0)
        self.decoder = decoder
        tokens = torch.randint(0, V, (B, T + 1), generator=generator)
        self.inputs, self.labels = tokens[:, :-1], tokens[:, 1:]
        self.counted = torch.rand(B, T, generator=generator) < 0.8

    def forward(self) -> DecoderOutput:
        return self.decoder(self.inputs, self.labels, self.counted)

    def oracle(self) -> OracleLosses:
        ffn = self.decoder.config.ffn
        assert isinstance(ffn, MoEConfig)
        return oracle_losses(self.forward, self.counted, ffn, self.decoder.routers())

    def forced(self, path: tuple[int, ...]) -> torch.Tensor:
        """(B, T) losses where a hook, not an argument, sends every token along the path."""

        def send(module: Any, args: Any, routing: Routing, expert: int) -> Routing:
            weights_N1 = routing.logits_NE.softmax(dim=1)[:, expert : expert + 1]
            return routing._replace(experts_NS=torch.full_like(routing.experts_NS, expert), weights_NS=weights_N1)

        hooks = [
            block.ffn.router.register_forward_hook(partial(send, expert=expert))
            for block, expert in zip(self.decoder.blocks, path, strict=True)
        ]
        with torch.no_grad():
            nll_BT = self.forward().nll_BT
        for hook in hooks:
            hook.remove()
        assert nll_BT is not None
        return nll_BT


def test_it_is_the_best_of_all_paths_within_what_the_router_spent() -> None:
    case = Case(model())
    for block in case.decoder.blocks:
        block.ffn.router.expert_bias.copy_(torch.tensor([0.0, 0.01, 0.02]))
    losses = case.oracle()
    for block in case.decoder.blocks:
        assert block.ffn.router.expert_bias.tolist() == pytest.approx([0.0, 0.01, 0.02]), "biases are put back"
    with torch.no_grad():
        learned = case.forward()
    assert learned.stats is not None
    assert learned.nll_BT is not None
    cost = (1.0, 0.5, 0.0)
    counts = learned.stats.counts_BE.sum(dim=(0, 1))
    spent = float(sum(c * n for c, n in zip(cost, counts.tolist(), strict=True)) / counts.sum())
    paths = list(itertools.product(range(3), repeat=L))
    allowed = [path for path in paths if sum(cost[e] for e in path) / L <= spent + 1e-6]
    assert 1 < len(allowed) < len(paths)

    def mean(nll_BT: torch.Tensor) -> float:
        return float(nll_BT[case.counted].double().mean())

    every = torch.stack([case.forced(path) for path in allowed])
    assert losses.budget == pytest.approx(spent)
    assert losses.learned == pytest.approx(mean(learned.nll_BT), rel=1e-6)
    assert losses.oracle == pytest.approx(mean(torch.minimum(every.amin(dim=0), learned.nll_BT)), rel=1e-6)
    assert losses.random == pytest.approx(sum(mean(nll) for nll in every) / len(allowed), rel=1e-6)
    assert losses.widest == pytest.approx(mean(case.forced((0,) * L)), rel=1e-6)
    assert losses.oracle < losses.learned
    assert losses.metrics()["oracle/gap"] == pytest.approx(losses.learned - losses.oracle)


def test_a_router_that_always_skips_leaves_the_oracle_its_own_path_only() -> None:
    decoder = model()
    for block in decoder.blocks:
        block.ffn.router.expert_bias.copy_(torch.tensor([0.0, 0.0, 100.0]))
    losses = Case(decoder).oracle()
    assert losses.budget == 0
    assert losses.learned == pytest.approx(losses.oracle)
    assert losses.random == pytest.approx(losses.learned)
    assert losses.widest != pytest.approx(losses.learned)


def test_even_experts_may_spend_what_they_like() -> None:
    losses = Case(model(sizes=[])).oracle()
    assert losses.budget == 1
    assert losses.oracle < losses.learned
