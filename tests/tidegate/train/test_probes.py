"""Probes: the numbers of telemetry, the same tokens at every context, and recall that a model has or has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tidegate.config import load
from tidegate.data import TokenDataset, prepare
from tidegate.model.decoder import Decoder, materialize
from tidegate.train.evaluate import held_out
from tidegate.train.job import Job
from tidegate.train.probes import context_losses, needles, observed
from tidegate.train.telemetry import Observer


class Asked(SimpleNamespace):
    job: Job
    dataset: TokenDataset
    model: Decoder


@pytest.fixture
def asked(tiny_job: Callable[..., Path], tmp_path: Path) -> Asked:
    path = tiny_job(data={"eval_sequences": 8}, model={"init_std": 0.3})
    job: Job = load(path, Job).config
    dataset = TokenDataset.open(prepare(job.data, cache_dir=tmp_path, job_dir=path.parent))
    model = materialize(lambda: Decoder(job.model), torch.device("cpu"), seed=1).eval()
    return Asked(job=job, dataset=dataset, model=model)


def test_pieces_add_up_to_what_is_observed_at_once(asked: Asked) -> None:
    found = observed(asked.model, asked.job, asked.dataset, 7)
    batch = held_out(asked.dataset, asked.job, 6)
    observer = Observer(asked.dataset.domains, 2, [0, 1], 0, 1)
    with torch.no_grad():
        output = asked.model(
            batch.tokens_BT1[:, :-1],
            batch.tokens_BT1[:, 1:],
            batch.loss_mask_BT,
            batch.documents_BT,
            sequences_B=batch.sequences_B,
            observe="all",
        )
    observer.add(output, batch.loss_mask_BT.sum(dim=1), batch.domains_B)
    at_once = observer.metrics(observer.vector())
    alike = [name for name in at_once if name.startswith(("moe/", "hidden/")) and "lbl_covariance" not in name]
    assert len(alike) > 40
    for name in alike:
        assert found[name] == pytest.approx(at_once[name], rel=1e-4, abs=1e-6), name
    assert found["attention/0/first_token"] != pytest.approx(at_once["attention/0/first_token"]), "of two sequences"


def test_every_context_ends_in_the_same_tokens(asked: Asked) -> None:
    losses = context_losses(asked.model, asked.job, asked.dataset, [32, 64, 256], 3)
    assert [loss.context for loss in losses] == [32, 64, 256]
    for context, nll in losses:
        expected = []
        for domain, piece in ((0, 0), (1, 0), (0, 1)):
            text = torch.from_numpy(asked.dataset.stream(domain, "held_out").read(257 * piece, 257 * piece + 257))
            tokens = text[None, -context - 1 :]
            with torch.no_grad():
                everything = torch.ones(1, context, dtype=torch.bool)
                logits = [
                    asked.model.logits(tokens[:, :-1], everything, place) for place in range(context - 16, context)
                ]
            expected.append(F.cross_entropy(torch.cat(logits), tokens[0, -16:]).item())
        assert nll == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert context_losses(asked.model, asked.job, asked.dataset, [10**7], 3) == []


class Recaller(nn.Module):
    """Says what came after the last token when it was there before, within so many tokens; else all is as likely."""

    def __init__(self, vocab_size: int, reach: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.vocab_size, self.reach = vocab_size, reach

    def logits(self, tokens_BT: torch.Tensor, counted_BT: torch.Tensor, place: int) -> torch.Tensor:
        logits_BV = torch.zeros(len(tokens_BT), self.vocab_size)
        for row, tokens in enumerate(tokens_BT.tolist()):
            before = [
                i for i in range(max(0, place - self.reach), place) if tokens[i : i + 1] == tokens[place : place + 1]
            ]
            pairs = [i for i in before if tokens[i - 1 : i + 1] == tokens[place - 1 : place + 1]]
            if pairs:
                logits_BV[row, tokens[pairs[-1] + 1]] = 20.0
        return logits_BV

    def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor, counted_BT: torch.Tensor) -> Any:
        places = counted_BT[0].nonzero().flatten().tolist()
        logits_BPV = torch.stack([self.logits(tokens_BT, counted_BT, place) for place in places], dim=1)
        return SimpleNamespace(nll=F.cross_entropy(logits_BPV.flatten(0, 1), labels_BT[counted_BT], reduction="sum"))


def test_a_needle_is_found_by_a_model_that_looks_as_far(asked: Asked) -> None:
    guess = torch.tensor(float(asked.dataset.vocab_size)).log().item()
    model: Any = Recaller(asked.dataset.vocab_size, reach=50)
    near, far = needles(model, asked.job, asked.dataset, [128], [1.0, 0.0], 4)
    assert (near.depth, near.found, far.found) == (1.0, 1.0, 0.0)
    assert near.nll < 0.01
    assert far.nll > 0.9 * guess, "beyond its reach"
    assert near.nll_without > 0.9 * guess, "nothing to recall"
    assert needles(model, asked.job, asked.dataset, [10**7], [0.0], 4) == []
    real = needles(asked.model, asked.job, asked.dataset, [40], [0.5], 4)[0]
    assert real.found == 0.0
    assert real.nll != real.nll_without
