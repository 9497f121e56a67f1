from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest

from tidegate.data.baseline import unigram_perplexity
from tidegate.data.config import DataConfig
from tidegate.data.loader import eval_batches
from tidegate.data.shards import TokenDataset

VOCAB_SIZE = 300


def test_perplexity_by_hand(
    write_dataset: Callable[..., TokenDataset], loader_config: Callable[..., DataConfig]
) -> None:
    dataset = write_dataset(
        {
            "a": ([[7, 7, 7, 0], [8, 0]], [[7, 8, 0], [9, 7, 7, 0]]),
            "b": ([[8, 8, 0, 9, 9, 0]], [[9, 9, 9, 9, 9, 0]]),
        }
    )
    # a: 6 train tokens, counts 7:3 8:1 0:2, denominator 6 + 300. Held-out 7 8 0 9 7 7 0 makes two windows of 3 + 1,
    # labels 8 0 | 9 | 7 7 0, of which the 9 follows an end of text: isolated documents do not score it.
    scored = [2 / 306, 3 / 306, 4 / 306, 4 / 306, 3 / 306]
    by_hand = math.exp(-sum(math.log(p) for p in scored) / 5)
    isolated = loader_config({"a": 1, "b": 1}, sequence_length=3)
    assert unigram_perplexity(dataset, isolated)["a"] == pytest.approx(by_hand, rel=1e-12)

    joined = loader_config({"a": 1, "b": 1}, sequence_length=3, documents="join")
    by_hand = math.exp(-(sum(math.log(p) for p in scored) + math.log(1 / 306)) / 6)
    assert unigram_perplexity(dataset, joined)["a"] == pytest.approx(by_hand, rel=1e-12)

    # b: one window, labels 9 9 9, each 3 of 306.
    assert unigram_perplexity(dataset, isolated)["b"] == pytest.approx(102.0, rel=1e-12)


@pytest.mark.parametrize("eval_sequences", [1, 3, 100])
def test_the_positions_are_those_of_the_evaluation(
    eval_sequences: int, two_domains: TokenDataset, loader_config: Callable[..., DataConfig]
) -> None:
    config = loader_config({"a": 1, "b": 1}, eval_sequences=eval_sequences)
    nll, count = Counter(), Counter()
    for batch in eval_batches(two_domains, config, micro_batch=2, rank=0, world_size=1):
        for tokens, mask, domain in zip(batch.tokens_BT1, batch.loss_mask_BT, batch.domains_B.tolist(), strict=True):
            stream = two_domains.stream(domain, "train")
            train = Counter(stream.read(0, len(stream)).tolist())
            for label in tokens[1:][mask].tolist():
                nll[domain] -= math.log((train[label] + 1) / (train.total() + VOCAB_SIZE))
                count[domain] += 1
    expected = {name: math.exp(nll[index] / count[index]) for index, name in enumerate(two_domains.domains)}
    assert unigram_perplexity(two_domains, config) == pytest.approx(expected, rel=1e-12)
