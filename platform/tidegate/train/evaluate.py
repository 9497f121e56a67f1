"""Held-out loss per domain, and which experts each domain uses.

Letters: D domains, B sequences, T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from tidegate.data.loader import EvalBatch, eval_batches
from tidegate.data.shards import TokenDataset
from tidegate.model.decoder import DecoderOutput
from tidegate.model.moe import MoEConfig
from tidegate.model.routers.top_k import TopKRouter
from tidegate.parallel import collectives
from tidegate.train.job import Job
from tidegate.train.oracle import OracleLosses, oracle_losses

if TYPE_CHECKING:  # the driver, which reads evaluations, need not import DeepSpeed
    from tidegate.parallel.engine import Engine
    from tidegate.train.generate import Sample

__all__ = ["Evaluation", "evaluate", "evaluate_oracle", "held_out"]


class Evaluation(NamedTuple):
    domains: tuple[str, ...]
    nll_D: list[float]
    """Nats a counted held-out token of each domain."""
    bpb_D: list[float] | None
    """The same text's bits a byte of UTF-8. None if its tokens have no length (see `token_bytes`)."""
    load_DLE: list[list[list[float]]] | None
    """Share of each domain's assignments that went to each expert, per layer; rows sum to 1. None if dense."""
    samples: tuple[Sample, ...] = ()
    """What the model writes, with `train.samples`."""

    def perplexity(self) -> dict[str, float]:
        return {domain: math.exp(min(nll, 700.0)) for domain, nll in zip(self.domains, self.nll_D, strict=True)}


def held_out(dataset: TokenDataset, job: Job, number: int) -> EvalBatch:
    """The first held-out sequences of all domains in turn; fewer if there are no more."""
    seen, windows = [0] * len(dataset.domains), []
    for batch in eval_batches(dataset, job.data, micro_batch=1, rank=0, world_size=1):
        domain = int(batch.domains_B)
        windows.append((seen[domain], domain, batch))
        seen[domain] += 1
    chosen = [batch for _, _, batch in sorted(windows, key=lambda window: window[:2])[:number]]
    return EvalBatch(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))


def evaluate_oracle(engine: Engine, job: Job, dataset: TokenDataset) -> OracleLosses:
    """Try every path on held-out sequences of all domains in turn; every rank runs the same: experts are spread."""
    ffn = job.model.ffn
    assert isinstance(ffn, MoEConfig)
    batch = held_out(dataset, job, job.train.oracle_sequences)
    tokens, documents, counted, _, sequences = (field.to(engine.device) for field in batch)
    isolated = documents if job.data.documents == "isolate" else None

    def forward() -> DecoderOutput:
        return engine.forward(tokens[:, :-1], tokens[:, 1:], counted, isolated, sequences_B=sequences)

    routers = [router for router in engine.model.routers() if isinstance(router, TopKRouter)]
    engine.train(False)
    losses = oracle_losses(forward, counted, ffn, routers)
    engine.train()
    return losses


def evaluate(engine: Engine, job: Job, dataset: TokenDataset) -> Evaluation:
    """Score the held-out sequences of every domain; every rank takes part and gets the same result."""
    isolate = job.data.documents == "isolate"
    batches = eval_batches(
        dataset,
        job.data,
        micro_batch=job.train.micro_batch,
        rank=collectives.rank() // job.parallel.sequence,
        world_size=collectives.world_size() // job.parallel.sequence,
    )
    num_domains = len(dataset.domains)
    bytes_V = None if dataset.token_bytes is None else torch.from_numpy(dataset.token_bytes).to(engine.device)
    totals_D3 = torch.zeros(num_domains, 3, dtype=torch.float64, device=engine.device)  # nats, tokens, bytes
    counts_DLE: torch.Tensor | None = None
    engine.train(False)
    with torch.no_grad():
        for batch in batches:
            tokens, documents, counted, domains, sequences = (t.to(engine.device) for t in batch)
            inputs, labels, counted = (engine.own_tokens(x) for x in (tokens[:, :-1], tokens[:, 1:], counted))
            output = engine.forward(inputs, labels, counted, documents if isolate else None, sequences_B=sequences)
            sums_B3 = [output.nll_B, counted.sum(dim=1), torch.zeros_like(output.nll_B)]
            if bytes_V is not None:
                sums_B3[2] = (bytes_V[labels] * counted).sum(dim=1)
            totals_D3.index_add_(0, domains, torch.stack([part.double() for part in sums_B3], dim=1))
            if output.stats is not None:
                counts_BLE = output.stats.counts_BE.transpose(0, 1)
                if counts_DLE is None:
                    counts_DLE = counts_BLE.new_zeros(num_domains, *counts_BLE.shape[1:])
                counts_DLE.index_add_(0, domains, counts_BLE)
    engine.train()
    collectives.all_reduce(totals_D3)
    nll_D = (totals_D3[:, 0] / totals_D3[:, 1].clamp(min=1)).tolist()
    bits_D = totals_D3[:, 0] / math.log(2) / totals_D3[:, 2].clamp(min=1)
    load_DLE = None
    if counts_DLE is not None:
        collectives.all_reduce(counts_DLE)
        load_DLE = (counts_DLE / counts_DLE.sum(dim=-1, keepdim=True).clamp(min=1)).tolist()
    return Evaluation(tuple(dataset.domains), nll_D, None if bytes_V is None else bits_D.tolist(), load_DLE)
