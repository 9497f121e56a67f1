"""The training loop. One step of time:

next batch -> forward and backward (accumulated) -> clip -> optimizer -> balance -> judge -> log -> save -> evaluate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tidegate.config import ConfigError
from tidegate.data.baseline import token_frequencies
from tidegate.data.loader import TrainLoader
from tidegate.data.shards import TokenDataset
from tidegate.metric_path import without_details
from tidegate.model.balance import Balancer
from tidegate.model.clock import Clock
from tidegate.model.moe import MoEConfig
from tidegate.model.weights import Weights
from tidegate.parallel import collectives
from tidegate.parallel.engine import Engine
from tidegate.train.checkpoint import Checkpoints, Position, Tracker
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.evaluate import Evaluation, evaluate, evaluate_oracle
from tidegate.train.generate import generate_samples
from tidegate.train.guards import GuardsState, Judge, Pending, Verdict
from tidegate.train.init_from import starting_weights
from tidegate.train.instruments import time_phases
from tidegate.train.job import Job
from tidegate.train.machines import Machines
from tidegate.train.masks import held_masks
from tidegate.train.memory import out_of_memory_explained
from tidegate.train.record import read_evaluation, read_step, read_times, read_tuned
from tidegate.train.replicas import compare_replicas
from tidegate.train.step import outcome_share, train_step, tune_step, update_routers, update_units
from tidegate.train.storage import Storage
from tidegate.train.telemetry import Observer, Record
from tidegate.train.throughput import Throughput, peak_flops
from tidegate.train.watchdog import Watchdog
from tidegate_kernels.choice import choose

__all__ = ["Outcome", "World", "train"]


class World(NamedTuple):
    """What a launcher gives to the loop. `record` is called on rank 0 only, and `notice` unless ranks hang."""

    dataset: Path
    """The prepared tokens."""
    checkpoints: str
    """Folder or URI of the run's checkpoints, which all ranks reach; training continues from the newest one."""
    record: Callable[[Record], None]
    """Show and track metrics; must not block."""
    notice: Callable[[str], None]
    """Show a line to the user; on its way when this returns, within seconds."""
    should_stop: Callable[[], bool]
    """Whether this rank was asked to end gracefully."""
    tracker: Tracker | None = None
    """Metrics on their way, for checkpoints; on rank 0."""


class Outcome(NamedTuple):
    """How a run ended; the same on every rank."""

    step: int
    tokens: int
    finished: bool
    """False if it was stopped before the last step, or paused."""
    stopped: bool
    """Before the last step and before its pause."""
    evaluation: Evaluation | None
    checkpoint: str
    """The last one, a folder or URI."""
    stalled_s: float
    """Seconds for which this rank stood still for checkpoints."""


def train(job: Job, world: World) -> Outcome:
    """Train until the last step, the pause, or until asked to stop; every rank of the process group calls this."""
    dataset = TokenDataset.open(world.dataset, verify=False)  # the launcher has verified the checksums
    loader = build_loader(job, dataset)
    weights = None if job.train.init_from is None or _resumes(world) else starting_weights(job)
    with out_of_memory_explained(job):
        engine = build_engine(job, weights)
    balancer = build_balancer(job)
    judge = Judge(job.guards, partial(_notice, world))
    isolate, paranoid = job.data.documents == "isolate", job.guards.compare_replicas_every
    evaluation, stopping = None, False
    times: list[dict[str, float]] = []  # of the steps since the last record

    with (
        out_of_memory_explained(job),
        Checkpoints(world.checkpoints, job, engine, world.tracker, world.notice) as checkpoints,
        build_watchdog(job, world, checkpoints.attempt) as watchdog,
        Machines(engine.device) as machines,
    ):
        step, tokens = _begin(job, checkpoints, engine, dataset, loader, judge, weights)
        if step and _evaluates(job, step, tokens):  # the run may have ended before it did, or while
            evaluation = _evaluate(world, job, checkpoints, engine, dataset, step, tokens)
        timer = time_phases(engine)
        throughput, pending = Throughput(job, peak_flops(engine.device)), Pending(judge, checkpoints.keep_batch)
        while tokens < job.train.end_tokens and not stopping:
            step += 1
            watchdog.beat(f"step {step}")
            timer.begin_step()
            timer.begin("data")
            batch = next(loader)
            timer.begin("other")
            tokens += job.train.batch_tokens
            learning_rate = job.optimizer.schedule.at(tokens, job.train.tokens)
            engine.set_learning_rate(learning_rate)
            clock = Clock(step, tokens, job.train.seed)
            last = tokens >= job.train.end_tokens
            logged = step % job.train.log_every == 0 or last
            observer = build_observer(job, dataset) if logged else None
            losses, before = train_step(
                engine,
                balancer,
                batch,
                clock,
                isolate=isolate,
                stop=world.should_stop(),
                last=pending.share,
                observer=observer,
            )
            if balancer is not None:
                update_routers(engine.model, balancer, clock, job.balance.bias_rate)
            update_units(engine.model, losses, clock)
            tuning = job.model.self_tune
            if tuning is not None and tokens > tuning.warmup_tokens and step % tuning.every == 0:
                tune_step(engine, loader.tuning_batch(step), clock, isolate=isolate)
            throughput.count(job.train.batch_tokens)

            counted, stops, *outcome = before.tensor().tolist()  # waits for the beginning of this step, not for its end
            stopping = stops > 0
            verdict = pending.judge(*outcome)
            pending.take(step, loader.taken, batch._asdict(), outcome_share(losses.nll, engine))
            saves = step % job.checkpoint.every == 0 or tokens == job.checkpoint.at_tokens or last or stopping
            if saves and verdict == "go on":
                verdict = pending.judge_now()
                saves = judge.trusts or last
            if verdict != "go on":
                step, tokens = _go_back(verdict, checkpoints, loader, world)
                pending.share = None
                throughput.restart()
                timer.drop_step()
                continue
            timer.end_step()
            times += timer.finished()

            metrics: dict[str, float] = {}
            if logged or stopping:
                kept = torch.full((), torch.nan, device=engine.device)  # not made on the host: a copy would wait
                if engine.model.units is not None:
                    kept = engine.model.units.expected_cost(clock).detach() / engine.model.units.units.total_cost
                metrics = read_step(job, losses, torch.stack([engine.gradient_norm(), kept]), machines, observer)
                times += timer.finished()  # the device has reached the end of this step: `read_step` waited for it
                metrics |= read_times(times)
                times.clear()
                metrics |= read_tuned(engine.model) | throughput.read() | checkpoints.read() | judge.metrics()
                metrics["train/learning_rate"] = learning_rate
                if not (last or step % job.train.eval_every < job.train.log_every):
                    metrics = without_details(metrics)
                _record(world, Record(step, tokens, metrics))

            if paranoid and (step % paranoid == 0 or saves):
                loss, norm = outcome
                seen = {"last loss": loss, "last gradient norm": norm, "counted tokens": counted}
                compare_replicas(engine, job.parallel.expert, step, {**seen, "learning rate": learning_rate})

            # Save before evaluating: an evaluation that runs out of memory must not cost the run.
            checkpoints.check()
            if saves:
                watchdog.beat(f"checkpoint of step {step}")
                checkpoints.save(Position(step, tokens, loader.state_dict(), judge.state._asdict()), metrics)
            if _evaluates(job, step, tokens):
                watchdog.beat(f"evaluation after step {step}")
                evaluation = _evaluate(world, job, checkpoints, engine, dataset, step, tokens)
                throughput.restart()
        loader.close()
    ends = tokens >= job.train.tokens, tokens < job.train.end_tokens
    return Outcome(step, tokens, *ends, evaluation, checkpoints.newest, checkpoints.stalled_s)


def build_loader(job: Job, dataset: TokenDataset) -> TrainLoader:
    """This rank's batches of the job."""
    return TrainLoader(
        dataset,
        job.data,
        global_batch=job.global_batch,
        micro_batch=job.train.micro_batch,
        rank=collectives.rank() // job.parallel.sequence,
        world_size=collectives.world_size() // job.parallel.sequence,
    )


def build_engine(job: Job, weights: Weights | None = None) -> Engine:
    """The job's model under DeepSpeed, on the kernels that the job chooses; without weights, drawn from its seed."""
    choose(job.kernels)
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
        optimizer_state=job.optimizer.state,
        recompute=job.train.recompute,
        keep_rows=job.train.keep_rows,
        weights=weights,
        masks=held_masks(job),
    )


def build_balancer(job: Job) -> Balancer | None:
    """The job's balance over this process group; None for a dense model."""
    if not isinstance(job.model.ffn, MoEConfig):
        return None
    return Balancer(job.balance, collectives.all_reduce, collectives.world_size(), job.accumulation, job.model.ffn)


def build_watchdog(job: Job, world: World, attempt: str) -> Watchdog:
    """Of this rank; its reports are beside the checkpoints."""
    place = Storage(world.checkpoints), attempt, collectives.rank(), collectives.world_size()
    return Watchdog(job.guards.hang_after_s, *place, world.notice)


def fit_routers(job: Job, engine: Engine, dataset: TokenDataset) -> None:
    """Show a new model's routers how often each token comes, if they ask."""
    if isinstance(job.model.ffn, MoEConfig) and job.model.ffn.capabilities.needs_token_ids:
        frequencies_V = torch.from_numpy(token_frequencies(dataset, job.data))
        for router in engine.model.routers():
            router.fit_tokens(frequencies_V)


def build_observer(job: Job, dataset: TokenDataset) -> Observer:
    """Telemetry of one step over this process group."""
    ffn = job.model.ffn
    top_k = ffn.top_k if isinstance(ffn, MoEConfig) else 0
    attending = list(job.model.windows) if job.parallel.sequence == 1 else []  # no rank sees all keys of its queries
    return Observer(dataset.domains, top_k, attending, collectives.rank(), collectives.world_size())


def _resumes(world: World) -> bool:
    """Whether there are checkpoints to continue from, so that nothing else is read; the same on every rank."""
    found = collectives.rank() == 0 and bool(CheckpointStore(Storage(world.checkpoints)).valid())
    return collectives.gather(found)[0]


def _begin(
    job: Job,
    checkpoints: Checkpoints,
    engine: Engine,
    dataset: TokenDataset,
    loader: TrainLoader,
    judge: Judge,
    weights: Weights | None,
) -> tuple[int, int]:
    """Continue from the last checkpoint or make the model ready for its first step; steps and tokens behind us."""
    position = checkpoints.resume()
    if position is None:
        if weights is None and job.train.init_from is not None:
            raise ConfigError(
                f"train.init_from={job.train.init_from} was not read, since there were checkpoints, but all of them "
                "are damaged; begin a new run"
            )
        if weights is None or weights.fresh:
            fit_routers(job, engine, dataset)
        loader.skip(job.train.from_tokens // job.train.batch_tokens)
        return loader.taken, job.train.from_tokens
    loader.load_state_dict(position.data)
    judge.state = GuardsState(**position.guards)
    return position.step, position.tokens


def _go_back(verdict: Verdict, checkpoints: Checkpoints, loader: TrainLoader, world: World) -> tuple[int, int]:
    """Restore the newest checkpoint; steps and tokens behind us then. The judge forgets nothing."""
    position = checkpoints.go_back()
    if verdict == "repeat":
        loader.load_state_dict(position.data)
    data = "with the same data" if verdict == "repeat" else "and leaves out the data since"
    _notice(world, f"the run goes back to step {position.step} {data}")
    return position.step, position.tokens


def _notice(world: World, line: str) -> None:
    if collectives.rank() == 0:
        world.notice(line)


def _evaluates(job: Job, step: int, tokens: int) -> bool:
    return step % job.train.eval_every == 0 or tokens >= job.train.end_tokens


def _evaluate(
    world: World, job: Job, checkpoints: Checkpoints, engine: Engine, dataset: TokenDataset, step: int, tokens: int
) -> Evaluation:
    evaluation = evaluate(engine, job, dataset)
    if job.train.samples:
        samples = generate_samples(engine, job, dataset, Clock(step, tokens, job.train.seed))
        evaluation = evaluation._replace(samples=samples)
    metrics = read_evaluation(evaluation)
    if tokens >= job.train.tokens and job.train.oracle_sequences:
        metrics |= evaluate_oracle(engine, job, dataset).metrics()
    _record(world, Record(step, tokens, metrics, evaluation))
    checkpoints.evaluated(step, metrics)
    return evaluation


def _record(world: World, record: Record) -> None:
    if collectives.rank() == 0:
        world.record(record)
