"""Continuations: against a pass over the text so far alone, and the same in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.train.generate import Sample, continued

V = 61


def model(**changes: Any) -> Decoder:
    fields = {
        "vocab_size": V,
        "width": 16,
        "num_layers": 2,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
        "ffn": {"kind": "moe", "num_experts": 5, "top_k": 2, "expert_dim": 8},
        "init_std": 0.5,
    }
    config = ModelConfig.model_validate(fields | changes)
    return materialize(lambda: Decoder(config), torch.device("cpu"), seed=1).eval()


def test_logits_are_those_that_the_loss_is_of() -> None:
    decoder = model()
    tokens, labels = torch.randint(V, (2, 3, 17)).unbind()
    everything = torch.ones(3, 17, dtype=torch.bool)
    nll_BT = decoder(tokens, labels, everything).nll_BT
    for place in (0, 5, 16):
        logits = decoder.logits(tokens, everything, place)
        found = torch.nn.functional.cross_entropy(logits, labels[:, place], reduction="none")
        torch.testing.assert_close(found, nll_BT[:, place])


BLOCKS = {"bank": {"kind": "gam", "slots": 5}, "best": {"kind": "dynamic_mask", "keep": 3}}
VALUES = {"num_heads": 4, "num_kv_heads": 1, "num_value_heads": 2, "augmented_query": 9, "head_dim": 4}


@pytest.mark.parametrize(
    "changes",
    [{}, {"ffn": {"kind": "dense", "hidden_dim": 8}}, {"layers": "bank, best", "mixers": BLOCKS, "attention": VALUES}],
    ids=["moe", "dense", "mixers"],
)
def test_greedy_tokens_are_the_likeliest_after_the_text_so_far(changes: dict[str, Any]) -> None:
    decoder, prompts = model(**changes), torch.randint(V, (3, 7))
    new = continued(decoder, prompts, 5, torch.zeros(3), Clock(1, 1, 0))
    for row in range(3):
        text = prompts[row]
        for token in new[row]:
            so_far = text[None]
            with torch.no_grad():
                logits = decoder.logits(so_far, torch.ones_like(so_far, dtype=torch.bool), so_far.shape[1] - 1)
            assert logits.argmax() == token
            text = torch.cat([text, token[None]])


def test_drawn_tokens_come_by_their_probability_and_hang_on_the_step() -> None:
    decoder, rows = model(init_std=0.2), 4000
    prompts = torch.randint(V, (1, 3)).expand(rows, -1)
    drawn = continued(decoder, prompts, 1, torch.ones(rows), Clock(3, 1, 0))
    with torch.no_grad():
        p = decoder.logits(prompts[:1], torch.ones(1, 3, dtype=torch.bool), 2).softmax(dim=1)[0]
    counts = torch.bincount(drawn[:, 0], minlength=V)
    deviations = (counts - rows * p) / (rows * p * (1 - p)).sqrt()
    assert deviations.abs().max() < 4.5
    assert deviations.std() < 1.5
    assert torch.equal(drawn, continued(decoder, prompts, 1, torch.ones(rows), Clock(3, 1, 0)))
    for other in (Clock(4, 1, 0), Clock(3, 1, 1)):
        assert not torch.equal(drawn, continued(decoder, prompts, 1, torch.ones(rows), other))


def samples_of_a_run(path: str, scratch: str) -> list[tuple[int, tuple[Sample, ...]]]:
    from tidegate.config import load
    from tidegate.data import prepare
    from tidegate.parallel import collectives
    from tidegate.train.job import Job
    from tidegate.train.loop import World, train

    job = load(path, Job).config
    job = job.model_copy(
        update={
            "resources": job.resources.model_copy(update={"workers": collectives.world_size()}),
            "parallel": job.parallel.model_copy(update={"expert": collectives.world_size()}),
        }
    )
    folder = prepare(job.data, cache_dir=Path(scratch) / "data", job_dir=Path(path).parent)
    seen = []

    def record(record: Any) -> None:
        if record.evaluation is not None:
            seen.append((record.step, record.evaluation.samples))

    checkpoints = f"{scratch}/checkpoints-{collectives.world_size()}"
    train(job, World(folder, checkpoints, record, print, lambda: False))
    return seen


def test_every_evaluation_continues_held_out_text_of_every_domain(
    tiny_job: Callable[..., Path], on_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """With experts on one rank and spread over two."""
    path = str(tiny_job(train={"samples": 2, "tokens": 6 * 512, "eval_every": 3}))
    (alone,) = on_ranks(1, samples_of_a_run, path, str(tmp_path))
    assert [step for step, _ in alone] == [3, 6]
    letters, digits = set("abcdefgh\n"), set("0123456789\n")
    for _, samples in alone:
        assert [sample.domain for sample in samples] == ["letters", "digits"] * 2
        for sample in samples:
            alphabet = letters if sample.domain == "letters" else digits
            assert set((sample.prompt + sample.text).replace("<|endoftext|>", "")) <= alphabet, "held-out text"
            assert sample.greedy
            assert sample.drawn != sample.greedy
    first, last = (samples for _, samples in alone)
    assert [sample.prompt for sample in first] == [sample.prompt for sample in last]
    assert [sample.drawn for sample in first] != [sample.drawn for sample in last]
    together, others = on_ranks(2, samples_of_a_run, path, str(tmp_path))
    assert together == alone
    assert others == [], "rank 0 records"
