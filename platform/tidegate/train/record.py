"""What a record says of a step or an evaluation, under the names of docs/metrics.md.

Letters: D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tidegate.model.decoder import Decoder
from tidegate.model.moe import MoEConfig
from tidegate.parallel import collectives
from tidegate.train.evaluate import Evaluation
from tidegate.train.job import Job
from tidegate.train.machines import Machines
from tidegate.train.step import StepLosses
from tidegate.train.telemetry import Observer

__all__ = ["read_evaluation", "read_step", "read_times", "read_tuned"]


def read_step(
    job: Job, losses: StepLosses, alike: torch.Tensor, machines: Machines, observer: Observer | None
) -> dict[str, float]:
    """Sum the step over ranks and read it: the one collective and the one host sync of a record.

    Args:
        alike: (2,) gradient norm, kept share of unit gates: the same on every rank.
        observer: of the step; None if nobody looked.
    """
    parts = [torch.stack([*losses]), alike / collectives.world_size(), _to(alike.device, machines.vector())]
    if observer is not None:
        parts.append(observer.vector())
    vector = torch.cat(parts)
    collectives.all_reduce(vector)
    of_losses, of_alike, of_machines, *observed = vector.cpu().split([len(part) for part in parts])
    read = dict(zip(StepLosses._fields, of_losses.tolist(), strict=True))
    metrics = {"train/loss": read["nll"]}
    metrics["train/gradient_norm"], kept = of_alike.tolist()
    metrics |= machines.metrics(of_machines)
    if job.model.units is not None:
        metrics |= {"units/penalty": read["units"], "units/expected_share": kept}
    if isinstance(job.model.ffn, MoEConfig):
        metrics |= _balance(job, job.model.ffn, read)
    if observer is not None:
        metrics |= observer.metrics(*observed)
    return metrics


def _balance(job: Job, ffn: MoEConfig, read: dict[str, float]) -> dict[str, float]:
    """The losses without their weights, as far as the job has them."""
    metrics = {}
    if ffn.capabilities.learned and (job.balance.loss_weight > 0 or ffn.capabilities.own_balance_weight):
        metrics["balance/lbl"] = read["lbl"]
    if job.balance.z_loss_weight > 0 and ffn.capabilities.z_loss:
        metrics["balance/z"] = read["z"] / (job.balance.z_loss_weight * job.model.num_layers)
    if job.balance.budget is not None:
        metrics["balance/budget"] = read["budget"] / job.balance.budget.weight
    if read["router"]:
        metrics["balance/router"] = read["router"]
    return metrics


def _to(device: torch.device, host: torch.Tensor) -> torch.Tensor:
    if device.type == "cuda":
        host = host.pin_memory()  # or the copy would wait for the device
    return host.to(device, non_blocking=True)


def read_times(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean time of each phase of some steps, which `StepTimer` gave in seconds; they add up to the mean step."""
    phases = {phase for step in steps for phase in step}
    means = {phase: sum(step.get(phase, 0.0) for step in steps) / len(steps) for phase in sorted(phases)}
    return {f"time/{phase}_ms": 1e3 * mean for phase, mean in means.items()}


def read_tuned(model: Decoder) -> dict[str, float]:
    """Where the model's own hyperparameters are, and how far they are perturbed; one host sync if there are any."""
    config, tuning = model.config.self_tune, model.self_tuning
    if config is None or tuning is None:
        return {}
    values = {name: value for name, value in config.values(tuning.location)._asdict().items() if value is not None}
    read = torch.stack([*values.values(), *tuning.log_spread.exp()]).tolist()
    spreads = dict(zip((f"tuned/{name}_spread" for name in config.tuned), read[len(values) :], strict=True))
    return dict(zip((f"tuned/{name}" for name in values), read, strict=False)) | spreads


def read_evaluation(evaluation: Evaluation) -> dict[str, float]:
    """Of each domain, and the mean over domains."""
    of_domain = {"loss": evaluation.nll_D, "bpb": evaluation.bpb_D}
    metrics = {f"val/{domain}/ppl": ppl for domain, ppl in evaluation.perplexity().items()}
    for name, values_D in of_domain.items():
        if values_D is not None:
            metrics |= {f"val/{d}/{name}": value for d, value in zip(evaluation.domains, values_D, strict=True)}
            metrics[f"val/{name}"] = sum(values_D) / len(values_D)
    return metrics
