"""Ray Train's decisions on how many workers there are and what a failure is, where Tidegate's differ.

Ray's elastic policy takes any number of workers, counts machines that are about to go, and tears a group of workers
down as it is. Ours takes world sizes of the job only, leaves such machines out, and asks the workers to end first: they
save at the end of their step and raise `Yielded`, which is nobody's failure. A notice that a machine will be taken away
makes them do the same, and has a budget of its own.

All that we use of Ray Train's private parts is in this file; tests/tidegate/launch/test_elastic.py says so when a new
Ray changes them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Literal

import ray
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from tidegate.launch.capacity import Needs, Patience, machines_there

__all__ = [
    "AllowedSizes",
    "Failures",
    "FixedSize",
    "NoRoom",
    "Notices",
    "Reason",
    "Stopped",
    "Trainer",
    "Yielded",
    "causes",
    "is_preempted",
    "notice",
]

Reason = Literal["", "stop", "growth", "preemption"]
"""Why a run should end after its step: the user's wish, room for more workers, a machine that will be taken away."""


class Yielded(Exception):
    """The workers saved and ended, so that Ray starts them again.

    Args:
        reason: growth or preemption.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Trainer(TorchTrainer):
    """`TorchTrainer` with Tidegate's policies.

    Args:
        sizes: numbers of workers that the job allows; None if it has one.
        board: where a wish for more is left, and that workers ended.
        needs: of the job.
        without: ids of nodes that get no workers.
        settings: of `TorchTrainer`.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] | None,
        board: Any,
        needs: Needs,
        without: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._sizes, self._board, self._needs, self._without = sizes, board, needs, without

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        failures: Any = self.run_config.failure_config
        settings["failure_policy"] = Failures(failures, self._board)
        waiting = self.scaling_config, self._board, Patience(self._needs, self._without)
        if self._sizes is None:
            settings["scaling_policy"] = FixedSize(*waiting)
        else:
            settings["scaling_policy"] = AllowedSizes(*waiting, self._sizes, self._without)
        return super()._initialize_and_run_controller(**settings)


class NoRoom(Exception):
    """The machines that a run needs have not come in time."""


class Stopped(Exception):
    """The user's wish to stop, where there are no workers to save and end."""


class _Patient:
    """Of a scaling policy: it waits for machines as long as the job says, or until the user wishes it to stop."""

    def __init__(self, scaling_config: Any, board: Any, patience: Patience) -> None:
        super().__init__(scaling_config)  # type: ignore[call-arg]
        self._board, self._patience = board, patience

    def make_decision_for_non_running_worker_group(self) -> Any:
        with contextlib.suppress(ray.exceptions.RayActorError):  # a board that died comes back
            if ray.get(self._board.is_stopping.remote()):
                raise Stopped
        if self._patience.is_out():
            raise NoRoom(self._patience.said())
        return super().make_decision_for_non_running_worker_group()  # type: ignore[misc]

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._patience.renew()
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)  # type: ignore[misc]


class FixedSize(_Patient, FixedScalingPolicy):
    """Always as many workers."""


class AllowedSizes(_Patient, ElasticScalingPolicy):
    """As many workers as there is room for, of the sizes that the job allows; runs in Ray Train's controller."""

    def __init__(
        self, scaling_config: Any, board: Any, patience: Patience, sizes: Sequence[int], without: Sequence[str]
    ) -> None:
        super().__init__(scaling_config, board, patience)
        self._sizes, self._without = tuple(sizes), without

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        usable = machines_there(self._without).keys() & reserved_resources.keys()
        reserved_resources = {node: reserved_resources[node] for node in usable}
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= possible), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            # Fewer come by failures and notices, which reach the workers. For more, they yield, and start again at the
            # size of that moment.
            if decision.num_workers > worker_group_state.num_workers:
                self._board.request_more.remote()
            return NoopDecision()
        return decision


class Failures(DefaultFailurePolicy):
    """`DefaultFailurePolicy`, for which workers that yielded have not failed; tells the board that they are gone."""

    def __init__(self, failure_config: Any, board: Any) -> None:
        super().__init__(failure_config)
        self._board = board

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        self._board.workers_ended.remote()
        for cause in causes(training_failed_error):
            if isinstance(cause, Yielded) and cause.reason == "growth":
                return FailureDecision.RETRY
            if isinstance(cause, Yielded):
                info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={})
                return super().make_decision(PreemptionError(preemption_info=info, drain_timed_out=False))
        return super().make_decision(training_failed_error)


class Notices(WorkerCallback):
    """Makes SIGTERM to a worker a notice; Ray would end the process. A second one does."""

    def after_init_train_context(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        _noticed.clear()
        previous = signal.getsignal(signal.SIGTERM)

        def handle(number: int, frame: FrameType | None) -> None:
            if _noticed.is_set() and callable(previous):
                previous(number, frame)
            notice()

        signal.signal(signal.SIGTERM, handle)


_noticed = threading.Event()


def notice() -> None:
    """Say in a worker that it, or its machine, will be taken away."""
    _noticed.set()


def is_preempted() -> bool:
    """Whether this worker knows that a machine of the run will be taken away; does not wait.

    `ray.train.get_preemption_info` is a meeting of all workers; what it spreads among them is read here, and the first
    collective of a step spreads it too.
    """
    return _noticed.is_set() or get_train_context().preemption_context.preemption_info is not None


def causes(error: Any) -> Iterator[BaseException]:
    """What the workers met, and what led to that, by Ray's wrappers."""
    for failure in getattr(error, "worker_failures", {}).values():
        seen: BaseException | None = failure
        while seen is not None:
            yield seen
            seen = getattr(seen, "cause", None) or seen.__cause__
