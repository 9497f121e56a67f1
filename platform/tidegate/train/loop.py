"""The training loop. One step of time:

next batch -> forward and backward (accumulated) -> clip -> optimizer -> balance -> log -> save -> evaluate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tidegate.data.loader import TrainLoader
from tidegate.data.shards import TokenDataset
from tidegate.model.balance import Balancer
from tidegate.model.moe import MoEConfig
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine
from tidegate.train import checkpoint
from tidegate.train.checkpoint import Position
from tidegate.train.evaluate import Evaluation, evaluate
from tidegate.train.job import Job
from tidegate.train.step import StepLosses, train_step, update_biases
from tidegate.train.telemetry import Record, Throughput, load_metrics, peak_flops

__all__ = ["Outcome", "World", "train"]


class World(NamedTuple):
    """What a launcher gives to the loop. Every rank gets the same functions; `record` is called on rank 0 only."""

    dataset: Path
    """The prepared tokens."""
    new_checkpoint: Callable[[int], Path]
    """An empty folder for this rank's part of the checkpoint of a step."""
    publish: Callable[[Path, Record], None]
    """Make a filled folder durable; blocks until it is. Every rank calls it for every checkpoint."""
    record: Callable[[Record], None]
    """Show and track metrics; must not block."""
    should_stop: Callable[[], bool]
    """Whether this rank was asked to end gracefully."""
    resume_from: Path | None = None
    """A checkpoint to continue from."""


class Outcome(NamedTuple):
    """How a run ended; the same on every rank."""

    step: int
    tokens: int
    finished: bool
    """False if it was stopped before the last step."""
    evaluation: Evaluation | None


def train(job: Job, world: World) -> Outcome:
    """Train until the job's last step or until asked to stop; every rank of the process group calls this."""
    dataset = TokenDataset.open(world.dataset, verify=False)  # the launcher has verified the checksums
    loader = TrainLoader(
        dataset,
        job.data,
        global_batch=job.global_batch,
        micro_batch=job.train.micro_batch,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
    )
    engine = build_engine(job)
    balancer = build_balancer(job)
    step, tokens = _resume(job, world, engine, loader)
    throughput = Throughput(job, peak_flops(engine.device))
    isolate = job.data.documents == "isolate"

    evaluation, stopping = None, False
    while tokens < job.train.tokens and not stopping:
        batch = next(loader)
        step += 1
        tokens += job.train.batch_tokens
        learning_rate = job.optimizer.schedule.at(tokens, job.train.tokens)
        engine.set_learning_rate(learning_rate)
        losses, stops = train_step(engine, balancer, batch, isolate=isolate, stop=world.should_stop())
        if balancer is not None and job.balance.bias_rate > 0:
            update_biases(engine.model, balancer.step_counts(), job.balance.bias_rate)
        throughput.count(job.train.batch_tokens)

        last = tokens >= job.train.tokens
        stopping = stops.read() > 0  # waits for the beginning of this step, not for its end
        if step % job.train.log_every == 0 or last or stopping:
            metrics = _read_losses(job, losses)
            metrics |= throughput.read() | {"train/learning_rate": learning_rate}
            metrics["train/gradient_norm"] = engine.gradient_norm()
            if balancer is not None:
                metrics |= load_metrics(balancer.step_counts())
            _record(world, Record(step, tokens, metrics))

        # Save before evaluating: an evaluation that runs out of memory must not cost the run.
        if step % job.train.save_every == 0 or last or stopping:
            _save(job, world, engine, loader, step, tokens)
            throughput.restart()
        if step % job.train.eval_every == 0 or last:
            evaluation = evaluate(engine, job, dataset)
            _record(world, Record(step, tokens, _evaluation_metrics(evaluation)))
            throughput.restart()
    loader.close()
    return Outcome(step, tokens, tokens >= job.train.tokens, evaluation)


def build_engine(job: Job) -> Engine:
    """The job's model under DeepSpeed, initialised from its seed."""
    return Engine(
        job.model,
        job.parallel,
        precision=job.train.precision,
        seed=job.train.seed,
        micro_batch=job.train.micro_batch,
        accumulation=job.accumulation,
        betas=job.optimizer.betas,
        eps=job.optimizer.eps,
        weight_decay=job.optimizer.weight_decay,
        gradient_clip=job.optimizer.gradient_clip,
        recompute=job.train.recompute,
    )


def build_balancer(job: Job) -> Balancer | None:
    """The job's balance over this process group; None for a dense model."""
    if not isinstance(job.model.ffn, MoEConfig):
        return None
    return Balancer(job.balance, collectives.all_reduce, collectives.world_size(), job.accumulation)


def _resume(job: Job, world: World, engine: Engine, loader: TrainLoader) -> tuple[int, int]:
    """Steps and tokens that are behind us."""
    if world.resume_from is None:
        return 0, 0
    position = checkpoint.load(world.resume_from, engine, job)
    loader.load_state_dict(position.data)
    return position.step, position.tokens


def _save(job: Job, world: World, engine: Engine, loader: TrainLoader, step: int, tokens: int) -> None:
    folder = world.new_checkpoint(step)
    checkpoint.save(folder, engine, job, Position(step, tokens, loader.state_dict()))
    world.publish(folder, Record(step, tokens, {}))


def _record(world: World, record: Record) -> None:
    if collectives.rank() == 0:
        world.record(record)


def _read_losses(job: Job, losses: StepLosses) -> dict[str, float]:
    """Sum the step's losses over ranks and read them: the one host sync of a record."""
    values = torch.stack([*losses])
    collectives.all_reduce(values)
    nll, load_balancing, z = values.tolist()
    metrics = {"train/loss": nll}
    if isinstance(job.model.ffn, MoEConfig):
        if job.balance.loss_weight > 0:
            metrics["balance/lbl"] = load_balancing / (job.balance.loss_weight * job.model.num_layers)
        if job.balance.z_loss_weight > 0:
            metrics["balance/z"] = z / (job.balance.z_loss_weight * job.model.num_layers)
    return metrics


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    metrics = {f"val/{domain}/loss": nll for domain, nll in zip(evaluation.domains, evaluation.nll_D, strict=True)}
    metrics |= {f"val/{domain}/ppl": ppl for domain, ppl in evaluation.perplexity().items()}
    metrics["val/loss"] = sum(evaluation.nll_D) / len(evaluation.nll_D)
    return metrics
