from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch

from tidegate.config import ConfigError
from tidegate.data.config import DataConfig
from tidegate.data.loader import EvalBatch, StepBatch, TrainLoader, check_tuning_windows, eval_batches
from tidegate.data.packing import num_windows, read_windows
from tidegate.data.shards import TokenDataset

LoaderConfig = Callable[..., DataConfig]
G = 8
RANK: dict[str, int] = {"micro_batch": 1, "rank": 0, "world_size": 1}


def global_batches(
    dataset: TokenDataset, config: DataConfig, steps: int, *, world_size: int, micro_batch: int
) -> list[list[tuple[int, ...]]]:
    """For each step the G sequences in global order, as tuples of domain and tokens, put together from all ranks."""
    ranks = [
        list(
            islice(
                TrainLoader(dataset, config, global_batch=G, micro_batch=micro_batch, rank=rank, world_size=world_size),
                steps,
            )
        )
        for rank in range(world_size)
    ]
    batches = []
    for step in range(steps):
        parts: list[StepBatch] = [batches[step] for batches in ranks]
        sequences = []
        for m in range(G // (world_size * micro_batch)):
            for part in parts:
                for b in range(micro_batch):
                    assert part.sequences_MB[m, b] == len(sequences), "a sequence does not know its place"
                    sequences.append((int(part.domains_MB[m, b]), *part.tokens_MBT1[m, b].tolist()))
        batches.append(sequences)
    return batches


def same(left: StepBatch, right: StepBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (1, 8), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_the_global_batch_is_the_same_at_any_world_size(
    world_size: int, micro_batch: int, two_domains: TokenDataset, loader_config: LoaderConfig
) -> None:
    config = loader_config({"a": 3, "b": 1}, seed=5)
    expected = global_batches(two_domains, config, 20, world_size=1, micro_batch=1)
    assert global_batches(two_domains, config, 20, world_size=world_size, micro_batch=micro_batch) == expected


def test_the_order_is_the_documented_one(two_domains: TokenDataset, loader_config: LoaderConfig) -> None:
    config = loader_config({"a": 3, "b": 1}, seed=5)
    cursors = [0, 0]
    expected = []
    for step in range(20):
        sequences = []
        for domain in np.random.default_rng([5, 0, step]).choice(2, size=G, p=[0.75, 0.25]):
            length = num_windows(len(two_domains.stream(domain, "train")), 4)
            epoch, place = divmod(cursors[domain], length)
            window = np.random.default_rng([5, 1 + domain, epoch]).permutation(length)[place]
            tokens = two_domains.stream(domain, "train").read(window * 4, window * 4 + 5)
            sequences.append((int(domain), *tokens.tolist()))
            cursors[domain] += 1
        expected.append(sequences)
    assert cursors[0] > 2 * num_windows(len(two_domains.stream(0, "train")), 4), "several epochs"
    assert global_batches(two_domains, config, 20, world_size=2, micro_batch=2) == expected


def test_ranks_are_disjoint_and_an_epoch_holds_every_window_once(
    two_domains: TokenDataset, loader_config: LoaderConfig
) -> None:
    config = loader_config({"a": 1, "b": 1e-9})
    length = num_windows(len(two_domains.stream(0, "train")), 4)
    steps = 2 * length // G + 1
    flat = [
        sequence
        for batch in global_batches(two_domains, config, steps, world_size=4, micro_batch=2)
        for sequence in batch
    ]
    places = [(0, "train", window) for window in range(length)]
    all_windows = read_windows(two_domains, places, sequence_length=4, documents="join").tokens_BT1
    every = sorted((0, *row) for row in all_windows.tolist())
    assert len(set(every)) == length, "the windows of this dataset can be told apart"
    first, second = flat[:length], flat[length : 2 * length]
    assert sorted(first) == every
    assert sorted(second) == every
    assert first != second, "a new permutation each epoch"
    assert first != every, "shuffled"


def test_seeds_give_different_orders(two_domains: TokenDataset, loader_config: LoaderConfig) -> None:
    orders = [
        global_batches(two_domains, loader_config({"a": 1, "b": 1}, seed=seed), 3, world_size=1, micro_batch=8)
        for seed in range(3)
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_mask_and_documents_are_those_of_the_tokens(two_domains: TokenDataset, loader_config: LoaderConfig) -> None:
    loader = TrainLoader(
        two_domains, loader_config({"a": 1, "b": 1}), global_batch=12, micro_batch=2, rank=1, world_size=2
    )
    batch = next(loader)
    assert batch.tokens_MBT1.shape == (3, 2, 5)
    ends = batch.tokens_MBT1[..., :-1] == 0
    assert torch.equal(batch.loss_mask_MBT, ~ends)
    assert torch.equal(batch.documents_MBT, (ends.cumsum(-1) - ends.long()).int())
    assert ends.any()
    assert [part.dtype for part in batch] == [torch.int64, torch.int32, torch.bool, torch.int64, torch.int64]
    # Train tokens of a are below 150, those of b are not: the domain index is that of the tokens.
    assert torch.equal(batch.domains_MB, (batch.tokens_MBT1.amax(-1) >= 150).long())


@pytest.mark.parametrize("handed_out", [0, 1, 7])
def test_resume_continues_identically_at_another_world_size(
    handed_out: int, two_domains: TokenDataset, loader_config: LoaderConfig
) -> None:
    config = loader_config({"a": 2, "b": 1}, seed=9)
    one_rank = {"global_batch": G, "micro_batch": 8, "rank": 0, "world_size": 1}
    loader = TrainLoader(two_domains, config, **one_rank)
    for _ in range(handed_out):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["step"], sum(state["cursors"].values())) == (handed_out, handed_out * G)
    expected = list(islice(loader, 12))

    skipped = TrainLoader(two_domains, config, **one_rank)
    skipped.skip(handed_out)
    assert skipped.state_dict() == state
    assert same(next(skipped), expected[0])

    resumed = TrainLoader(two_domains, config, **one_rank)
    resumed.load_state_dict(state)
    assert all(same(*pair) for pair in zip(islice(resumed, 12), expected, strict=True))
    assert resumed.state_dict() == loader.state_dict()

    halves = [
        TrainLoader(two_domains, config, global_batch=G, micro_batch=4, rank=rank, world_size=2) for rank in (0, 1)
    ]
    for half in halves:
        next(half)  # a batch was read ahead already: loading must drop it
        half.load_state_dict(state)
    for whole in expected:
        tokens = torch.cat([next(half).tokens_MBT1 for half in halves], dim=1)
        assert torch.equal(tokens, whole.tokens_MBT1)


def test_a_state_that_means_other_windows_is_refused(
    two_domains: TokenDataset, write_dataset: Callable[..., TokenDataset], loader_config: LoaderConfig
) -> None:
    weights = {"a": 1, "b": 1}
    split = {"global_batch": G, "micro_batch": 1, "rank": 0, "world_size": 1}
    state = TrainLoader(two_domains, loader_config(weights), **split).state_dict()
    with pytest.raises(ConfigError, match="the stored position has seed 0, this job has 1"):
        TrainLoader(two_domains, loader_config(weights, seed=1), **split).load_state_dict(state)
    with pytest.raises(ConfigError, match="the stored position has sequence_length 4, this job has 5"):
        TrainLoader(two_domains, loader_config(weights, sequence_length=5), **split).load_state_dict(state)
    tokens = [[*range(1, 30), 0]]
    other = write_dataset({"a": (tokens, tokens), "b": (tokens, tokens)}, "other")
    with pytest.raises(ConfigError, match=f"the stored position has dataset '{two_domains.fingerprint}', this job"):
        TrainLoader(other, loader_config(weights), **split).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data\.domains: the job has b, a; .* has a, b"):
        TrainLoader(two_domains, loader_config({"b": 1, "a": 1}), **split)


def test_tuning_reads_held_out_windows_that_evaluation_does_not(
    two_domains: TokenDataset, loader_config: LoaderConfig
) -> None:
    config = loader_config({"a": 3, "b": 1}, seed=5, eval_sequences=2)
    check_tuning_windows(two_domains, config)
    one_rank = {"global_batch": G, "micro_batch": 8, "rank": 0, "world_size": 1}
    loader = TrainLoader(two_domains, config, **one_rank)
    next(loader)
    reported = {tuple(row) for batch in eval_batches(two_domains, config, **RANK) for row in batch.tokens_BT1.tolist()}
    held_out = {
        tuple(row)
        for domain in (0, 1)
        for window in range(num_windows(len(two_domains.stream(domain, "held_out")), config.sequence_length))
        for row in read_windows(
            two_domains, [(domain, "held_out", window)], sequence_length=config.sequence_length, documents="isolate"
        ).tokens_BT1.tolist()
    }
    seen = set()
    for step in range(1, 40):
        batch = loader.tuning_batch(step)
        assert same(batch, TrainLoader(two_domains, config, **one_rank).tuning_batch(step)), "it hangs on the past"
        halves = [
            TrainLoader(two_domains, config, global_batch=G, micro_batch=4, rank=rank, world_size=2).tuning_batch(step)
            for rank in (0, 1)
        ]
        assert torch.equal(torch.cat([half.tokens_MBT1 for half in halves], dim=1), batch.tokens_MBT1)
        seen |= {tuple(row) for row in batch.tokens_MBT1.flatten(0, 1).tolist()}
    assert seen == held_out - reported
    too_many = loader_config({"a": 3, "b": 1}, seed=5, eval_sequences=1000)
    with pytest.raises(ConfigError, match=r"data.eval_sequences=1000 takes all held-out sequences of domain 'a'"):
        check_tuning_windows(two_domains, too_many)


def test_weights_are_met_within_five_sigma(two_domains: TokenDataset, loader_config: LoaderConfig) -> None:
    loader = TrainLoader(
        two_domains, loader_config({"a": 3, "b": 1}, seed=2), global_batch=64, micro_batch=64, rank=0, world_size=1
    )
    drawn = Counter(int(domain) for batch in islice(loader, 200) for domain in batch.domains_MB.flatten())
    count = drawn.total()
    assert count == 64 * 200
    assert abs(drawn[1] / count - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    assert loader.state_dict()["cursors"] == {"a": drawn[0], "b": drawn[1]}


@pytest.mark.parametrize(("global_batch", "micro_batch", "world_size"), [(8, 3, 1), (8, 2, 3), (4, 8, 1), (0, 1, 1)])
def test_a_batch_that_does_not_divide_is_refused(
    global_batch: int, micro_batch: int, world_size: int, two_domains: TokenDataset, loader_config: LoaderConfig
) -> None:
    with pytest.raises(ConfigError, match=f"global batch of {global_batch} sequences .* = {micro_batch * world_size}$"):
        TrainLoader(
            two_domains,
            loader_config({"a": 1, "b": 1}),
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=0,
            world_size=world_size,
        )


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("eval_sequences", [2, 5, 100])
def test_evaluation_scores_each_held_out_window_once(
    micro_batch: int, world_size: int, eval_sequences: int, two_domains: TokenDataset, loader_config: LoaderConfig
) -> None:
    config = loader_config({"a": 1, "b": 1}, eval_sequences=eval_sequences)
    by_rank: list[list[EvalBatch]] = [
        list(eval_batches(two_domains, config, micro_batch=micro_batch, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    real, padding, places = Counter(), 0, []
    for batches in by_rank:
        for batch in batches:
            assert batch.tokens_BT1.shape == (micro_batch, 5)
            for tokens, documents, mask, domain, place in zip(*batch, strict=True):
                places.append(int(place))
                if (tokens == 0).all():
                    padding += 1
                    assert not mask.any()
                    assert not documents.any()
                else:
                    assert torch.equal(mask, tokens[:-1] != 0)
                    real[(int(domain), *tokens.tolist())] += 1
    expected = Counter()
    for domain in (0, 1):
        stream = two_domains.stream(domain, "held_out")
        for window in range(min(eval_sequences, num_windows(len(stream), 4))):
            expected[(domain, *stream.read(window * 4, window * 4 + 5).tolist())] += 1
    assert real == expected
    assert sorted(places) == list(range(len(places))), "two windows claim one place"
    assert padding < micro_batch * world_size, "no batch is padding on every rank"
