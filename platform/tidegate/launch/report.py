"""What a person sees: a header, one line a record (or a live bar on a terminal), tables at the end."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tidegate.model.balance import max_violation
from tidegate.model.flops import total
from tidegate.redact import redact
from tidegate.train.evaluate import Evaluation
from tidegate.train.job import Job
from tidegate.train.telemetry import Record

__all__ = ["SHADES", "Reporter"]

SHADES = " ▁▂▃▄▅▆▇█"


class Reporter:
    """Prints a run's progress.

    Args:
        job: for its length.
        console: where to; None makes one on standard output.
    """

    def __init__(self, job: Job, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.job = job
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def header(self, run_name: str, where: str) -> None:
        job, cost = self.job, total(self.job.model, self.job.data.sequence_length)
        self.say(
            f"run {run_name}: {cost.params / 1e6:.1f} M parameters, {cost.active_params / 1e6:.1f} M active, "
            f"{cost.flops_per_token / 1e6:.1f} MFLOP a token; "
            f"{job.total_steps} steps of {job.train.batch_tokens:,} tokens"
        )
        self.say(f"layout: {job.resources.workers} workers ({where}), {job.layout}, accumulation {job.accumulation}")

    def say(self, text: str) -> None:
        self.console.print(redact(text), soft_wrap=True, markup=False)

    def start(self) -> None:
        """Begin live progress if this is a terminal."""
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=self.job.total_steps)
            self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def record(self, record: Record) -> None:
        metrics = record.metrics
        if "train/loss" not in metrics:
            self.say(f"step {record.step} held-out perplexity: {_perplexities(metrics)}")
        elif self._progress is not None:
            self._progress.update(self._task, completed=record.step, description=_line(metrics))
        else:
            self.say(f"step {record.step}/{self.job.total_steps} tokens {record.tokens:,} {_line(metrics)}")

    def evaluation(self, evaluation: Evaluation, unigram: dict[str, float]) -> None:
        """Tables of the last evaluation."""
        table = Table("domain", "held-out loss", "perplexity", "unigram", "ratio")
        for nll, (domain, ppl) in zip(evaluation.nll_D, evaluation.perplexity().items(), strict=True):
            table.add_row(
                domain, f"{nll:.3f}", f"{ppl:.1f}", f"{unigram[domain]:.1f}", f"{unigram[domain] / ppl:.1f} x"
            )
        self.console.print(table)
        if evaluation.load_DLE is not None:
            self.console.print(_load_table(evaluation))


def _line(metrics: dict[str, float]) -> str:
    parts = [f"loss {metrics['train/loss']:.3f}"]
    if "balance/lbl" in metrics:
        parts.append(f"lbl {metrics['balance/lbl']:.3f}")
    violations = [value for name, value in metrics.items() if name.endswith("/maxvio") and name.count("/") == 2]
    if violations:
        parts.append(f"maxvio {max(violations):.2f}")
    parts.append(f"grad {metrics['train/gradient_norm']:.2f}")
    parts.append(f"lr {metrics['train/learning_rate']:.2e}")
    parts.append(f"{metrics['speed/tokens_per_s']:,.0f} tok/s")
    if "speed/mfu" in metrics:
        parts.append(f"{metrics['speed/model_tflops_per_device']:.0f} TFLOP/s")
        parts.append(f"mfu {100 * metrics['speed/mfu']:.1f} % of {metrics['speed/peak_tflops_per_device']:.0f}")
    return " ".join(parts)


def _perplexities(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.split('/')[1]} {value:.1f}" for name, value in metrics.items() if name.endswith("/ppl"))


def _load_table(evaluation: Evaluation) -> Table:
    """Expert load on held-out text, a row a layer; up to 16 experts also as a bar chart a domain."""
    load_DLE = torch.tensor(evaluation.load_DLE)
    pooled_LE = load_DLE.mean(dim=0)
    violation = max_violation(pooled_LE).tolist()
    charts = evaluation.domains if load_DLE.shape[-1] <= 16 else ()
    table = Table("layer", *charts, "min %", "max %", "maxvio", title="expert load (held-out)")
    top = float(load_DLE.max())
    for layer, row_E in enumerate(pooled_LE):
        bars = [
            "".join(SHADES[round(8 * float(share) / top)] for share in load_DLE[d, layer]) for d in range(len(charts))
        ]
        low, high = 100 * row_E.min(), 100 * row_E.max()
        table.add_row(str(layer), *bars, f"{low:.1f}", f"{high:.1f}", f"{violation[layer]:.2f}")
    return table
