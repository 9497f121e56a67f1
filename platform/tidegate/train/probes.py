"""What a trained model does, asked beside its loss: sinks, experts, long contexts, recall.

Every probe reads held-out text, whole from one process, and returns numbers; `tidegate probe` prints them.

Letters: B sequences, T tokens of the training length, C tokens of a context, N tokens of a needle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tidegate.data.loader import EvalBatch
from tidegate.data.shards import TokenDataset
from tidegate.model.clock import Clock, derive_key, uniform
from tidegate.model.decoder import Decoder
from tidegate.model.moe import MoEConfig
from tidegate.model.observations import MAX_SEQUENCES
from tidegate.train.evaluate import held_out
from tidegate.train.generate import continued
from tidegate.train.job import Job
from tidegate.train.telemetry import Observer

__all__ = ["ContextLoss", "Needle", "context_losses", "needles", "observed"]

NEEDLE_TOKENS, CUE_TOKENS = 8, 4
"""Of a needle, and of its beginning that is said again at the end."""


class ContextLoss(NamedTuple):
    context: int
    """C, tokens before and with the scored ones."""
    nll: float
    """Nats a token of the same T / 4 tokens at each context's end."""


class Needle(NamedTuple):
    context: int
    """C, with needle, cue and answer."""
    depth: float
    """Where in the text the needle lies: 0 its beginning, 1 just before the cue."""
    nll: float
    """Nats a token of the needle's end, after its beginning."""
    nll_without: float
    """The same where the text does not hold the needle."""
    found: float
    """Share of the needles of which greedy decoding says the whole end."""


@torch.no_grad()
def observed(model: Decoder, job: Job, dataset: TokenDataset, sequences: int) -> dict[str, float]:
    """Attention, residual stream and routing on the first held-out sequences of all domains in turn.

    Args:
        model: in evaluation mode.
        sequences: at least 2; an odd one is left out.

    Returns:
        Under the names of docs/metrics.md.
    """
    batch = held_out(dataset, job, sequences)
    device = next(model.parameters()).device
    chunks = list(_chunks(batch))
    ffn = job.model.ffn
    top_k = ffn.top_k if isinstance(ffn, MoEConfig) else 0
    total: torch.Tensor | None = None
    # A chunk is as large as what attention is observed on, and takes the place of a rank.
    for place, chunk in enumerate(chunks):
        observer = Observer(dataset.domains, top_k, list(job.model.windows), place, len(chunks))
        tokens, documents, counted, domains, rows = (field.to(device) for field in chunk)
        isolated = documents if job.data.documents == "isolate" else None
        output = model(tokens[:, :-1], tokens[:, 1:], counted, isolated, sequences_B=rows, observe="all")
        observer.add(output, counted.sum(dim=1), domains)
        vector = observer.vector()
        total = vector if total is None else total + vector
    assert total is not None
    return observer.metrics(total.cpu())


def _chunks(batch: EvalBatch) -> Iterator[EvalBatch]:
    for start in range(0, max(1, len(batch.tokens_BT1) - MAX_SEQUENCES + 1), MAX_SEQUENCES):
        yield EvalBatch(*(field[start : start + MAX_SEQUENCES] for field in batch))


@torch.no_grad()
def context_losses(
    model: Decoder, job: Job, dataset: TokenDataset, contexts: Sequence[int], sequences: int
) -> list[ContextLoss]:
    """Loss of the same tokens after ever more text, documents joined: what a longer context brings, or breaks.

    Args:
        model: in evaluation mode.
        contexts: C, each at least half of the training length; the longest decides which tokens are scored.
        sequences: B, over all domains; fewer if the held-out text has no more.

    Returns:
        One for each of `contexts`; none if no domain's held-out text is as long.
    """
    text_BC = _text(dataset, max(contexts) + 1, sequences).to(next(model.parameters()).device)
    if not len(text_BC):
        return []
    scored = max(1, job.data.sequence_length // 4)
    found = []
    for context in contexts:
        tokens_BC1 = text_BC[:, -context - 1 :]
        counted_BC = torch.zeros_like(tokens_BC1[:, 1:], dtype=torch.bool)
        counted_BC[:, -scored:] = True
        nll = sum(
            model(tokens_1C1[:, :-1], tokens_1C1[:, 1:], counted_1C).nll.item()
            for tokens_1C1, counted_1C in zip(tokens_BC1.split(1), counted_BC.split(1), strict=True)
        )
        found.append(ContextLoss(context, nll / (scored * len(text_BC))))
    return found


@torch.no_grad()
def needles(
    model: Decoder, job: Job, dataset: TokenDataset, contexts: Sequence[int], depths: Sequence[float], sequences: int
) -> list[Needle]:
    """Whether the model says the end of a string of random tokens that it has read before, after its beginning.

    Random tokens cannot be guessed from the language, so that what is right was recalled; nothing is asked that only a
    model trained on questions could answer.

    Args:
        model: in evaluation mode.
        contexts: C; those that needle, cue and answer fill are left out.
        depths: 0 to 1.
        sequences: B, as `context_losses` takes them.

    Returns:
        One for each context and depth; none if no domain's held-out text is as long.
    """
    text_BC = _text(dataset, max(contexts), sequences)
    if not len(text_BC):
        return []
    device = next(model.parameters()).device
    known_V = text_BC.unique()  # a token that training never showed would be hard to say again
    drawn_BN = uniform(torch.arange(len(text_BC)), NEEDLE_TOKENS, derive_key(job.data.seed, "needle"))
    needle_BN = known_V[(drawn_BN * len(known_V)).long()]
    cue_BN, answer_BN = needle_BN.split([CUE_TOKENS, NEEDLE_TOKENS - CUE_TOKENS], dim=1)
    found = []
    for context in contexts:
        if context <= 2 * NEEDLE_TOKENS:
            continue
        hay_BC = text_BC[:, : context - 2 * NEEDLE_TOKENS]  # needle, cue and answer
        filler_BN = text_BC[:, -NEEDLE_TOKENS:]
        for depth in depths:
            cut = round(depth * hay_BC.shape[1])
            with_needle, without = (
                torch.cat([hay_BC[:, :cut], middle_BN, hay_BC[:, cut:], cue_BN], dim=1).to(device)
                for middle_BN in (needle_BN, filler_BN)
            )
            recalled, guessed = (_nll_of_end(model, prompt, answer_BN.to(device)) for prompt in (with_needle, without))
            heat_B = torch.zeros(len(text_BC), device=device)
            said_BN = continued(model, with_needle, answer_BN.shape[1], heat_B, Clock(0, 0, 0)).cpu()
            whole = (said_BN == answer_BN).all(dim=1).float().mean().item()
            found.append(Needle(context, depth, recalled, guessed, whole))
    return found


def _nll_of_end(model: Decoder, prompt_BP: torch.Tensor, answer_BN: torch.Tensor) -> float:
    tokens_BT1 = torch.cat([prompt_BP, answer_BN], dim=1)
    counted_BT = torch.zeros_like(tokens_BT1[:, 1:], dtype=torch.bool)
    counted_BT[:, -answer_BN.shape[1] :] = True
    return model(tokens_BT1[:, :-1], tokens_BT1[:, 1:], counted_BT).nll.item() / answer_BN.numel()


def _text(dataset: TokenDataset, length: int, number: int) -> torch.Tensor:
    """(B, length) int64 pieces of held-out text, from the domains in turn; fewer than `number` if there are no more."""
    streams = [dataset.stream(domain, "held_out") for domain in range(len(dataset.domains))]
    places = [
        (start, domain) for domain, stream in enumerate(streams) for start in range(0, len(stream) - length + 1, length)
    ]
    pieces = [streams[domain].read(start, start + length) for start, domain in sorted(places)[:number]]
    return torch.stack([torch.from_numpy(piece) for piece in pieces]) if pieces else torch.empty(0, length).long()
