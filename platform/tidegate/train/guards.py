"""What a run does when a step goes wrong: it goes on, or goes back to its last checkpoint.

All that is judged are a step's global loss and gradient norm, which every rank has in the same bits, so all ranks come
to the same verdict without asking each other. They are read one step late, with the beginning of the next: no step
waits for its own end. A checkpoint is only written of a step that was judged, and was finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from tidegate.config import Config
from tidegate.parallel import collectives

__all__ = ["GuardsConfig", "GuardsState", "Judge", "Pending", "SpikeConfig", "TrainingDiverged", "Verdict"]

Verdict = Literal["go on", "repeat", "skip ahead"]
"""Go back with the same data again, or with the data that would have come next."""
_WINDOW, _LEARNING_STEPS = 100, 20


class SpikeConfig(Config):
    """Loss spikes: steps whose loss is so many deviations above its moving average over about 100 steps."""

    deviations: float = Field(default=4.0, gt=0)
    action: Literal["warn", "skip_batches", "rollback"] = "warn"
    """`warn` says so and goes on. `skip_batches` goes back to the last checkpoint and leaves out the data from there to
    the spike (PaLM, arXiv 2204.02311, section 5.1). `rollback` goes back and trains on the same data again: for
    hardware that computed something wrong."""


class GuardsConfig(Config):
    spikes: SpikeConfig = SpikeConfig()
    nonfinite_steps: int = Field(default=3, ge=1)
    """A step whose loss or gradient is not finite changes nothing. After so many in a row the run goes back to its last
    checkpoint and leaves out the data from there on."""
    rollbacks: int = Field(default=3, ge=0)
    """How often a run may go back before it ends with an error."""
    compare_replicas_every: int = Field(default=0, ge=0)
    """Steps between two comparisons of weights, router state and step values over the ranks that should have the same
    ones, bit for bit; 0: never. Short on the command line: --paranoid N."""
    hang_after_s: float = Field(default=1800.0, ge=0)
    """A rank that stands still for so many seconds (in one step, one evaluation or one checkpoint) ends the run, with
    the stacks of all ranks and the name of the one that the others wait for; 0: wait for ever."""


class TrainingDiverged(Exception):
    """A run went back as often as it may."""


class GuardsState(NamedTuple):
    """What the judge remembers; part of a checkpoint."""

    mean: float = 0.0
    """Of the loss: exponential, with a memory of 100 steps."""
    variance: float = 0.0
    steps: int = 0
    """That taught the two."""
    spikes: int = 0
    """So far."""
    nonfinite: int = 0
    """Steps so far that changed nothing."""
    in_row: int = 0
    """Of these, up to now."""
    rollbacks: int = 0


class Judge:
    """Judges every step once, in order.

    Args:
        config: of the job.
        notice: shows a line to the user.
    """

    def __init__(self, config: GuardsConfig, notice: Callable[[str], None]) -> None:
        self._config, self._notice = config, notice
        self.state = GuardsState()

    def judge(self, step: int, loss: float, gradient_norm: float) -> Verdict:
        """What to do after a step.

        Args:
            step: its number.
            loss: nats a token over the global batch.
            gradient_norm: before clipping.

        Raises:
            TrainingDiverged: it is to go back once more than it may.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return self._nonfinite(step, loss, gradient_norm)
        self.state = self.state._replace(in_row=0)
        limit = self._learn(loss)
        if loss <= limit:
            return "go on"
        self.state = self.state._replace(spikes=self.state.spikes + 1)
        what = f"step {step}: the loss is {loss:.4f}, above {limit:.4f}"
        if self._config.spikes.action == "warn":
            self._notice(what)
            return "go on"
        return self._back(what, "skip ahead" if self._config.spikes.action == "skip_batches" else "repeat")

    def _nonfinite(self, step: int, loss: float, gradient_norm: float) -> Verdict:
        state = self.state = self.state._replace(nonfinite=self.state.nonfinite + 1, in_row=self.state.in_row + 1)
        what = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}"
        if state.in_row < self._config.nonfinite_steps:
            self._notice(f"{what}; it changed nothing")
            return "go on"
        return self._back(f"{what}; steps in a row that are not finite: {state.in_row}", "skip ahead")

    def _back(self, what: str, verdict: Verdict) -> Verdict:
        if self.state.rollbacks >= self._config.rollbacks:
            raise TrainingDiverged(f"{what}; the run went back guards.rollbacks={self._config.rollbacks} times already")
        self.state = self.state._replace(rollbacks=self.state.rollbacks + 1, in_row=0)
        self._notice(what)
        return verdict

    def _learn(self, loss: float) -> float:
        """The limit that held for a loss; average and deviation learn nothing from a spike but its clipped value."""
        mean, variance, steps, *_ = self.state
        limit = mean + self._config.spikes.deviations * math.sqrt(variance) if steps >= _LEARNING_STEPS else math.inf
        rate = max(1 / (steps + 1), 1 / _WINDOW)  # a mean over fewer steps than the memory is the plain mean of them
        difference = min(loss, limit) - mean
        self.state = self.state._replace(
            mean=mean + rate * difference, variance=(1 - rate) * (variance + rate * difference**2), steps=steps + 1
        )
        return limit

    @property
    def trusts(self) -> bool:
        """Whether weights may be kept: those that make every step infinite are no checkpoint."""
        return self.state.in_row == 0

    def metrics(self) -> dict[str, float]:
        """Counts so far."""
        return {
            "train/loss_spikes": self.state.spikes,
            "guards/nonfinite_steps": self.state.nonfinite,
            "guards/rollbacks": self.state.rollbacks,
        }


class Pending:
    """The step that is not judged yet.

    Args:
        judge: of the run.
        keep: takes the number and the content of a batch that a step went wrong on.
    """

    def __init__(self, judge: Judge, keep: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._judge, self._keep = judge, keep
        self.share: torch.Tensor | None = None
        """(2,) this rank's shares of its loss and gradient norm; None if every step is judged."""
        self._step, self._number = 0, 0
        self._batch: dict[str, Any] = {}

    def take(self, step: int, number: int, batch: Mapping[str, Any], share: torch.Tensor) -> None:
        """A step that was taken.

        Args:
            step: its number.
            number: of its batch in the order of data.
            batch: what this rank trained on, on the host.
            share: as above.
        """
        self._step, self._number, self._batch, self.share = step, number, {"step": step, **batch}, share

    def judge(self, loss: float, gradient_norm: float) -> Verdict:
        """The verdict on it, if there is one; its batch is kept if something is wrong."""
        if self.share is None:
            return "go on"
        self.share = None
        verdict = self._judge.judge(self._step, loss, gradient_norm)
        if verdict != "go on" or not self._judge.trusts:
            self._keep(self._number, self._batch)
        return verdict

    def judge_now(self) -> Verdict:
        """Wait for its end; every rank calls this."""
        assert self.share is not None
        collectives.all_reduce(self.share)
        return self.judge(*self.share.tolist())
