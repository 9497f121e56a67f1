"""Held-out loss a token and a byte, of a real model on real text, at one and two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest


def evaluated(path: str, scratch: str) -> tuple[list[float], list[float], list[float]]:
    """Nats a token and bits a byte of each domain; and those bits from the decoded text."""
    from tokenizers import Tokenizer

    from tidegate.config import load
    from tidegate.data import TokenDataset, prepare
    from tidegate.data.packing import read_windows
    from tidegate.train.evaluate import evaluate
    from tidegate.train.job import Job
    from tidegate.train.loop import build_engine

    job = load(path, Job).config
    folder = prepare(job.data, cache_dir=Path(scratch), job_dir=Path(path).parent)
    dataset = TokenDataset.open(folder)
    found = evaluate(build_engine(job), job, dataset)
    assert found.bpb_D is not None
    tokenizer, expected = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for domain, nll in enumerate(found.nll_D):
        places: list[Any] = [(domain, "held_out", window) for window in range(job.data.eval_sequences)]
        read = read_windows(dataset, places, sequence_length=job.data.sequence_length, documents=job.data.documents)
        labels = read.tokens_BT1[:, 1:][read.loss_mask_BT]
        text = tokenizer.decode(labels.tolist(), skip_special_tokens=True)  # ASCII: no token ends within a character
        expected.append(nll * len(labels) / math.log(2) / len(text.encode()))
    return found.nll_D, found.bpb_D, expected


@pytest.mark.parametrize("documents", ["isolate", "join"])
def test_bits_a_byte_are_those_of_the_text_that_was_scored(
    documents: str, tiny_job: Any, on_ranks: Any, tmp_path: Path
) -> None:
    path = str(tiny_job(data={"documents": documents, "eval_sequences": 7}))
    ((nll, bpb, expected),) = on_ranks(1, evaluated, path, str(tmp_path))
    assert bpb == pytest.approx(expected, rel=1e-9)
    assert all(b != pytest.approx(n / math.log(2), rel=0.05) for n, b in zip(nll, bpb, strict=True)), "tokens merge"
    for other in on_ranks(2, evaluated, path, str(tmp_path)):
        assert other[1] == pytest.approx(bpb, rel=1e-6)
