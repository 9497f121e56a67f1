"""Sequences of associative recall: every key that is asked for has one value, which came before."""

from __future__ import annotations

import pytest
import torch

from tidegate.data.recall import recall_batch


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(48, 6, 128), (16, 4, 64), (4, 1, 8), (510, 64, 8192)])
def test_every_question_has_its_answer_before_it(length: int, pairs: int, vocab: int) -> None:
    tokens, labels, counted = recall_batch(50, length, pairs, vocab, torch.Generator().manual_seed(1))
    assert counted.sum(dim=1).eq(pairs).all()
    for row, answers, asked in zip(tokens.tolist(), labels.tolist(), counted, strict=True):
        written = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(written) == len(set(written.values())) == pairs
        assert all(1 <= key < vocab // 2 <= value < vocab for key, value in written.items())
        places = asked.nonzero().flatten().tolist()
        assert min(places) >= 2 * pairs
        assert {row[place]: answers[place] for place in places} == written
        assert all(row[place] == 0 for place in range(2 * pairs, length) if place not in places)


def test_questions_come_soon_and_draws_repeat() -> None:
    first = recall_batch(2000, 64, 4, 64, torch.Generator().manual_seed(1))
    again = recall_batch(2000, 64, 4, 64, torch.Generator().manual_seed(1))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    where = first.counted_BT.double().mean(dim=0)[8::2]
    assert where[0] > 2 * where[4] > 2 * where[-1] > 0


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(47, 4, 64), (14, 4, 64), (64, 4, 8), (64, 4, 65)])
def test_what_does_not_fit_is_refused(length: int, pairs: int, vocab: int) -> None:
    with pytest.raises(ValueError, match=rf"length={length}, pairs={pairs}, vocab_size={vocab}: "):
        recall_batch(2, length, pairs, vocab)
