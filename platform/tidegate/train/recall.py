"""Whether a stack of blocks can learn to recall at all: a new model of it on fresh associative recall, step by step.

What text has taught a run's weights is another question (`probes.needles`). The settings are those at which attention
and linear mixers were calibrated: AdamW behind 100 steps of warm-up, decay 0.1, clipping at 1, 64 sequences a step, the
loss of the asked positions only. The rate is the caller's: mixers learn in a narrow window (arXiv 2508.19029).

Letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from tidegate.data.recall import Recall, recall_batch
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import Clock, derive_key
from tidegate.model.decoder import NO_LABEL, Decoder, ModelConfig, materialize
from tidegate.model.moe import MoEConfig
from tidegate.train.step import update_routers

__all__ = ["Learned", "RecallTask", "Score", "learn_recall", "learned", "reading"]

_BATCH, _WARM_UP, _DECAY, _CLIP = 64, 100, 0.1, 1.0
_EVERY, _TESTED = 100, 512
_ENOUGH = 0.99


class RecallTask(NamedTuple):
    """As `recall_batch` takes it."""

    length: int = 48
    pairs: int = 6
    vocab_size: int = 128


class Score(NamedTuple):
    step: int
    accuracy: float
    """Share of the questions on the same 512 sequences that are answered right."""


class Learned(NamedTuple):
    accuracy: float
    """The best."""
    reached: int | None
    """Step at which it was 0.99; None: never."""


def learn_recall(
    model: ModelConfig,
    balance: BalanceConfig,
    task: RecallTask,
    steps: int,
    rate: float,
    seed: int,
    device: str = "cpu",
) -> Iterator[Score]:
    """Train a new model, a score every hundred steps and at the end.

    Everything that the config says of blocks holds; its vocabulary is the task's. QK-clip and self-tuning stand still.

    Args:
        model: the stack.
        balance: of its experts, if it has any: over all tokens, asked or not.
        task: which sequences.
        steps: at most.
        rate: of learning.
        seed: of weights and sequences; those that are tested are the same for all.
        device: where the model is, in fp32.

    Raises:
        ValueError: the task does not fit itself, see `recall_batch`.
    """
    config = model.model_copy(update={"vocab_size": task.vocab_size, "self_tune": None})
    test = _batch(task, _TESTED, torch.Generator().manual_seed(derive_key("recall test")), device)
    decoder = materialize(lambda: Decoder(config), torch.device(device), seed)
    balancer = None
    if isinstance(config.ffn, MoEConfig):
        balancer = Balancer(balance, lambda _: None, 1, 1, config.ffn)
        frequencies_V = test.tokens_BT.flatten().bincount(minlength=task.vocab_size) / test.tokens_BT.numel()
        for router in decoder.routers():
            router.fit_tokens(frequencies_V.double().cpu())
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=_DECAY)
    generator = torch.Generator().manual_seed(derive_key(seed, "recall"))
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / _WARM_UP)
        clock = Clock(step, step * _BATCH * task.length, seed)
        loss = _loss(decoder, balancer, _batch(task, _BATCH, generator, device), clock)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            update_routers(decoder, balancer, clock, balance.bias_rate)
        if decoder.units is not None:
            decoder.units.update(decoder, clock, loss.detach(), lambda _: None)
        if step % _EVERY == 0 or step == steps:
            yield Score(step, _accuracy(decoder, test))


def learned(scores: Iterable[Score]) -> Learned:
    """The best of the scores, read until it is enough."""
    best = 0.0
    for step, accuracy in scores:
        best = max(best, accuracy)
        if accuracy >= _ENOUGH:
            return Learned(best, step)
    return Learned(best, None)


def reading(accuracy: float, task: RecallTask) -> str:
    """What an accuracy says of a mixer: the levels at which models stay are chance, one in so many pairs, and 1."""
    chance, guess = 2 / task.vocab_size, 1 / task.pairs
    if accuracy >= _ENOUGH:
        return "recalls"
    if accuracy < chance + 0.3 * (guess - chance):  # 0.06 at the calibrated size; what sees no other token had 0.04
        return "no recall across tokens"
    if accuracy < min(2 * guess, (1 + guess) / 2):
        return "knows which values there are, not which is asked for"
    return "recalls a part"


def _batch(task: RecallTask, sequences: int, generator: torch.Generator, device: str) -> Recall:
    batch = recall_batch(sequences, *task, generator)
    return Recall(*(field.to(device) for field in batch))


def _loss(decoder: Decoder, balancer: Balancer | None, batch: Recall, clock: Clock) -> torch.Tensor:
    """() nats a question, with what experts and unit gates add; routing counts all tokens, the head the asked ones."""
    labels_BT = batch.labels_BT.masked_fill(~batch.counted_BT, NO_LABEL)
    everything_BT = torch.ones_like(batch.counted_BT)
    output = decoder(batch.tokens_BT, labels_BT, everything_BT, clock=clock)
    loss: torch.Tensor = output.nll / batch.counted_BT.sum()
    if balancer is not None:
        balancer.begin_step()
        tokens_B = everything_BT.sum(dim=1).float()
        loss = loss + balancer.losses(output.stats, tokens_B, tokens_B.sum()).total
    return loss if output.unit_penalty is None else loss + output.unit_penalty


@torch.no_grad()
def _accuracy(decoder: Decoder, test: Recall) -> float:
    decoder.eval()
    right = 0
    for tokens_BT, labels_BT, counted_BT in zip(*(field.split(_BATCH) for field in test), strict=True):
        said_N = decoder.logits(tokens_BT, torch.ones_like(counted_BT), counted_BT).argmax(dim=-1)
        right += int((said_N == labels_BT[counted_BT]).sum())
    decoder.train()
    return right / int(test.counted_BT.sum())
