"""Continuations of held-out text by the model in training, for people to read.

Without a cache of keys and values: each new token is a pass over whole rows, which are short. Rows have their full
length from the start, so that kernels see one shape; attention is causal, and what is not written yet does not count.

Letters: B rows, P prompt tokens, N new tokens, T = P + N, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from tidegate.data.shards import TokenDataset
from tidegate.model.clock import Clock, derive_key, uniform
from tidegate.model.decoder import Decoder
from tidegate.train.evaluate import held_out
from tidegate.train.job import Job

if TYPE_CHECKING:
    from tidegate.parallel.engine import Engine

__all__ = ["Sample", "continued", "generate_samples", "samples_of"]

PROMPT_TOKENS, NEW_TOKENS = 32, 32


class Sample(NamedTuple):
    """A prompt of held-out text, and what comes after it."""

    domain: str
    prompt: str
    text: str
    """What does."""
    greedy: str
    """The likeliest token each time."""
    drawn: str
    """A token drawn by its probability each time."""


def generate_samples(engine: Engine, job: Job, dataset: TokenDataset, clock: Clock) -> tuple[Sample, ...]:
    """Continue the beginnings of the first `train.samples` held-out sequences of every domain.

    Every rank of the process group calls this, since experts are spread, and continues all of them: the rows and the
    draws are the same at any number of ranks.

    Args:
        clock: draws hang on it.
    """
    engine.train(False)
    samples = samples_of(engine.model, job, dataset, job.train.samples, clock)
    engine.train()
    return samples


def samples_of(model: Decoder, job: Job, dataset: TokenDataset, of_each: int, clock: Clock) -> tuple[Sample, ...]:
    """The same of a model in evaluation mode; `of_each` domain."""
    batch = held_out(dataset, job, of_each * len(dataset.domains))
    num_new = min(NEW_TOKENS, job.data.sequence_length // 2)
    num_prompt = min(PROMPT_TOKENS, job.data.sequence_length - num_new)
    prompts_BP, text_BN = batch.tokens_BT1[:, : num_prompt + num_new].split((num_prompt, num_new), dim=1)
    rows, device = len(prompts_BP), next(model.parameters()).device
    heat_B = torch.arange(2, device=device).repeat_interleave(rows).float()
    new_BN = continued(model, prompts_BP.repeat(2, 1).to(device), num_new, heat_B, clock)
    domains = (dataset.domains[domain] for domain in batch.domains_B.tolist())
    columns = (prompts_BP, text_BN, *new_BN.cpu().split(rows))
    texts = (dataset.tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False) for ids in columns)
    return tuple(Sample(*fields) for fields in zip(domains, *texts, strict=True))


@torch.no_grad()
def continued(
    model: Decoder, prompts_BP: torch.Tensor, num_new: int, heat_B: torch.Tensor, clock: Clock
) -> torch.Tensor:
    """(B, N) int64 the tokens after the prompts; nothing syncs the host.

    Args:
        model: in evaluation mode.
        prompts_BP: int64.
        num_new: N.
        heat_B: fp32, temperature of each row; 0 takes the likeliest token.
        clock: draws hang on it, and on the row and the place in it.
    """
    num_prompt = prompts_BP.shape[1]
    tokens_BT = F.pad(prompts_BP, (0, num_new))
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    rows_B = torch.arange(len(tokens_BT), device=tokens_BT.device)
    for place in range(num_prompt, tokens_BT.shape[1]):
        written_BT = (place_T < place).expand_as(tokens_BT)
        logits_BV = model.logits(tokens_BT, written_BT, place - 1)
        key = derive_key(clock.seed, clock.step, "sample", place)
        gumbel_BV = -uniform(rows_B, logits_BV.shape[1], key).log().neg().log()
        tokens_BT[:, place] = (logits_BV + heat_B[:, None] * gumbel_BV).argmax(dim=1)
    return tokens_BT[:, num_prompt:]
