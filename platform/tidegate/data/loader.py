"""The order in which training and evaluation read a dataset.

The order is a function of the seed alone. Step s draws the domain of each of its G sequences by weight; inside a
domain, sequences follow a new permutation every epoch; a cursor per domain counts how many were taken. Ranks cut the
same global batch into parts, so neither the world size nor the micro-batch changes what is learnt from.

M  accumulation steps
B  micro-batch, sequences per rank and accumulation step
T  sequence length
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tidegate.config import ConfigError
from tidegate.data.config import DataConfig
from tidegate.data.packing import check_lengths, num_windows, read_windows
from tidegate.data.shards import Split, TokenDataset

__all__ = [
    "EvalBatch",
    "StepBatch",
    "TrainLoader",
    "check_tuning_windows",
    "eval_batches",
    "eval_windows",
    "scored_bytes",
    "scored_fingerprint",
]

# Third word of the seed of the domain draws. NumPy pads seeds with zeros, so [seed, s] would be the stream of
# [seed, s, 0], the permutation of domain s - 1 in epoch 0; permutations have 1 + domain in this place.
_DRAWS = 0
_TUNING = 2**32  # the word after _DRAWS and epochs: none of theirs has one there


class StepBatch(NamedTuple):
    """All that one rank needs for one optimizer step."""

    tokens_MBT1: torch.Tensor
    """int64; inputs are `[..., :-1]`, labels `[..., 1:]`."""
    documents_MBT: torch.Tensor
    """int32 document of each input position, 0-based within the sequence."""
    loss_mask_MBT: torch.Tensor
    """bool, False where the label belongs to another document than the input."""
    domains_MB: torch.Tensor
    """int64 domain index."""
    sequences_MB: torch.Tensor
    """int64 place of each sequence in the global batch."""


class EvalBatch(NamedTuple):
    """One micro-batch of held-out sequences; rows that pad the last batches have an all-False loss mask."""

    tokens_BT1: torch.Tensor
    documents_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    domains_B: torch.Tensor
    sequences_B: torch.Tensor
    """int64 place of each window among all held-out windows."""


class _State(NamedTuple):
    step: int
    cursors: tuple[int, ...]


class TrainLoader:
    """Endless iterator over this rank's part of every global batch, reading one batch ahead in a thread.

    Args:
        dataset: the prepared tokens.
        config: the job's data section.
        global_batch: sequences per optimizer step over all ranks, G.
        micro_batch: B.
        rank: 0 <= rank < world_size.
        world_size: number of data-parallel ranks.

    Raises:
        ConfigError: when the global batch does not divide, or a domain has no whole sequence.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        config: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        per_pass = micro_batch * world_size
        if global_batch < 1 or micro_batch < 1 or global_batch % per_pass:
            raise ConfigError(
                f"global batch of {global_batch} sequences is not a whole number of passes of micro-batch "
                f"{micro_batch} x {world_size} ranks = {per_pass}"
            )
        _check_domains(dataset, config)
        self.dataset = dataset
        self.config = config
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.accumulation = global_batch // per_pass
        # Sequence q of the global batch goes to accumulation step m, rank r, row b: q = (m * world + r) * B + b.
        grid = np.arange(global_batch).reshape(self.accumulation, world_size, micro_batch)
        self._mine = grid[:, rank].reshape(-1)
        weights = np.array([domain.weight for domain in config.domains])
        self._weights = weights / weights.sum()
        self._permutations: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}
        self._fingerprint = dataset.fingerprint
        self._state = _State(0, (0,) * len(config.domains))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tidegate-data")
        self._ahead: Future[tuple[StepBatch, _State]] | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> StepBatch:
        ahead = self._ahead or self._reader.submit(self._load, self._state)
        batch, self._state = ahead.result()
        self._ahead = self._reader.submit(self._load, self._state)
        return batch

    @property
    def taken(self) -> int:
        """Batches handed out, of the order of data: those before a checkpoint count, those left out too."""
        return self._state.step

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position after the batches handed out so far; the batch read ahead does not count."""
        return {
            "step": self._state.step,
            "cursors": dict(zip(self.dataset.domains, self._state.cursors, strict=True)),
            "seed": self.config.seed,
            "sequence_length": self.config.sequence_length,
            "dataset": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, at any world size, micro-batch, global batch or weights.

        Raises:
            ConfigError: for the state of another dataset, seed or sequence length, whose cursors mean other windows.
        """
        ours = self.state_dict()
        for key in ("dataset", "seed", "sequence_length"):
            if state.get(key) != ours[key]:
                raise ConfigError(f"data: the stored position has {key} {state.get(key)!r}, this job has {ours[key]!r}")
        self._state = _State(int(state["step"]), tuple(int(state["cursors"][name]) for name in self.dataset.domains))
        if self._ahead is not None:
            self._ahead.result()  # two loads at once would race for the permutations
            self._ahead = None

    def skip(self, batches: int) -> None:
        """Leave out the next batches, without reading them."""
        assert self._ahead is None, "a batch was read ahead"
        for _ in range(batches):
            _, self._state = self._draw(self._state)

    def tuning_batch(self, step: int) -> StepBatch:
        """This rank's part of a global batch of held-out windows that evaluation does not score, a function of the step
        alone. `check_tuning_windows` says whether there are any."""
        rng = np.random.default_rng([self.config.seed, step, _TUNING])
        drawn_G = rng.choice(len(self._weights), size=self.global_batch, p=self._weights)
        places_G = rng.random(self.global_batch)
        places: list[tuple[int, Split, int]] = []
        for sequence in self._mine:
            domain = int(drawn_G[sequence])
            spare = _spare_windows(self.dataset, self.config, domain)
            window = self.config.eval_sequences + int(places_G[sequence] * spare)
            places.append((domain, "held_out", window))
        return self._batch(places)

    def _load(self, state: _State) -> tuple[StepBatch, _State]:
        (drawn_G, position_G), following = self._draw(state)
        places: list[tuple[int, Split, int]] = []
        for sequence in self._mine:
            domain = int(drawn_G[sequence])
            places.append((domain, "train", self._window(domain, int(position_G[sequence]))))
        return self._batch(places), following

    def _draw(self, state: _State) -> tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], _State]:
        """Domain and position in it of every sequence of a global batch, and the state after it."""
        rng = np.random.default_rng([self.config.seed, _DRAWS, state.step])
        drawn_G = rng.choice(len(self._weights), size=self.global_batch, p=self._weights)
        position_G = np.empty(self.global_batch, np.int64)
        cursors = list(state.cursors)
        for domain in range(len(cursors)):
            chosen = np.flatnonzero(drawn_G == domain)
            position_G[chosen] = cursors[domain] + np.arange(len(chosen))
            cursors[domain] += len(chosen)
        return (drawn_G, position_G), _State(state.step + 1, tuple(cursors))

    def _window(self, domain: int, position: int) -> int:
        length = num_windows(len(self.dataset.stream(domain, "train")), self.config.sequence_length)
        epoch, place = divmod(position, length)
        cached = self._permutations.get(domain)
        if cached is None or cached[0] != epoch:
            rng = np.random.default_rng([self.config.seed, 1 + domain, epoch])
            cached = self._permutations[domain] = (epoch, rng.permutation(length))
        return int(cached[1][place])

    def _batch(self, places: list[tuple[int, Split, int]]) -> StepBatch:
        config = self.config
        read = read_windows(self.dataset, places, sequence_length=config.sequence_length, documents=config.documents)
        shape = (self.accumulation, self.micro_batch)
        tokens, documents, mask = (torch.from_numpy(part).unflatten(0, shape) for part in read)
        domains = torch.tensor([domain for domain, _, _ in places]).unflatten(0, shape)
        return StepBatch(tokens, documents, mask, domains, torch.from_numpy(self._mine).unflatten(0, shape))


def eval_windows(dataset: TokenDataset, config: DataConfig, domain: int) -> int:
    """How many held-out windows of a domain evaluation scores: the first `eval_sequences`, or all it has."""
    return min(config.eval_sequences, num_windows(len(dataset.stream(domain, "held_out")), config.sequence_length))


def scored_fingerprint(dataset: TokenDataset, config: DataConfig) -> str:
    """Hash of what evaluation scores: equal where losses and perplexities are of the same tokens, on any machine."""
    parts = [dataset.tokenizer_sha256, config.documents, str(config.sequence_length)]
    for index, domain in enumerate(dataset.manifest.domains):
        parts += [domain.name, str(eval_windows(dataset, config, index))]
        parts += [shard.sha256 for shard in domain.held_out.shards]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def scored_bytes(dataset: TokenDataset, config: DataConfig) -> int | None:
    """Bytes of UTF-8 text that evaluation reads in all domains; None if tokens have no length (see `token_bytes`)."""
    lengths_V = dataset.token_bytes
    if lengths_V is None:
        return None
    total = 0
    for index in range(len(dataset.domains)):
        end = eval_windows(dataset, config, index) * config.sequence_length
        total += int(lengths_V[dataset.stream(index, "held_out").read(0, end)].sum())
    return total


def check_tuning_windows(dataset: TokenDataset, config: DataConfig) -> None:
    """Raise ConfigError unless every domain has held-out windows beyond those that evaluation scores."""
    for index, domain in enumerate(config.domains):
        if _spare_windows(dataset, config, index) < 1:
            raise ConfigError(
                f"data.eval_sequences={config.eval_sequences} takes all held-out sequences of domain {domain.name!r}, "
                f"and model.self_tune needs others; raise its held_out={domain.held_out} or lower eval_sequences"
            )


def _spare_windows(dataset: TokenDataset, config: DataConfig, domain: int) -> int:
    """Held-out windows of a domain that evaluation does not score."""
    length = num_windows(len(dataset.stream(domain, "held_out")), config.sequence_length)
    return length - config.eval_sequences


def eval_batches(
    dataset: TokenDataset, config: DataConfig, *, micro_batch: int, rank: int, world_size: int
) -> Iterator[EvalBatch]:
    """This rank's part of the held-out windows of all domains.

    Every rank yields the same number of batches, since each takes part in the collectives of each; the last ones are
    padded with rows of end-of-text whose loss mask is False (and whose domain index is 0).

    Args:
        dataset: the prepared tokens.
        config: the job's data section.
        micro_batch: B.
        rank: 0 <= rank < world_size.
        world_size: number of data-parallel ranks.

    Raises:
        ConfigError: when a domain has no whole held-out sequence.
    """
    assert micro_batch >= 1, micro_batch
    assert 0 <= rank < world_size, (rank, world_size)
    _check_domains(dataset, config)
    places: list[tuple[int, Split, int]] = [
        (domain, "held_out", window)
        for domain in range(len(dataset.domains))
        for window in range(eval_windows(dataset, config, domain))
    ]
    for start in range(0, len(places), micro_batch * world_size):
        first = start + rank * micro_batch
        yield _eval_batch(dataset, config, places[first : first + micro_batch], micro_batch, first)


def _eval_batch(
    dataset: TokenDataset, config: DataConfig, places: list[tuple[int, Split, int]], micro_batch: int, first: int
) -> EvalBatch:
    read = read_windows(dataset, places, sequence_length=config.sequence_length, documents=config.documents)
    missing = micro_batch - len(places)
    rows = ((0, missing), (0, 0))
    return EvalBatch(
        tokens_BT1=torch.from_numpy(np.pad(read.tokens_BT1, rows, constant_values=dataset.eot_id)),
        documents_BT=torch.from_numpy(np.pad(read.documents_BT, rows)),
        loss_mask_BT=torch.from_numpy(np.pad(read.loss_mask_BT, rows)),
        domains_B=torch.tensor([domain for domain, _, _ in places] + [0] * missing),
        sequences_B=torch.arange(first, first + micro_batch),
    )


def _check_domains(dataset: TokenDataset, config: DataConfig) -> None:
    named = tuple(domain.name for domain in config.domains)
    if named != dataset.domains:
        raise ConfigError(
            f"data.domains: the job has {', '.join(named)}; {dataset.folder} has {', '.join(dataset.domains)}"
        )
    check_lengths(dataset, config)
