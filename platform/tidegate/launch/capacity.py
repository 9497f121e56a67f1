"""Whether a Ray cluster has room for a job, can get it, and how long to wait for that.

Room is counted in whole workers machine by machine, of what machines have rather than of what is free: one that is busy
with another job is waited for without end; one that is not there, for `resources.wait_minutes`.

What we use of Ray's private parts to that end is in this file; tests/tidegate/launch/test_elastic.py looks at it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import ray
import ray._private.state
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator

from tidegate.config import ConfigError
from tidegate.train.job import Job

__all__ = ["Needs", "Patience", "check_capacity", "machines_there", "room", "wait_for_room"]

_LOOK_EVERY_S = 1.0
_ASKED_FOR_S = 60.0
"""How long a request outlives a driver that asks no more, however it ended."""
_QUIET_S = 30.0
"""Within which an autoscaler begins to bring a machine that it can bring; it looks every five seconds."""


class Needs(NamedTuple):
    """What a job asks a cluster for."""

    per_worker: dict[str, float]
    """Ray's resources."""
    workers: int
    """Without which it does not start."""
    field: str
    """Of the job, that says `workers`."""
    wait_s: float

    @classmethod
    def of(cls, job: Job) -> Needs:
        resources = job.resources
        per_worker = {"CPU": float(resources.cpus_per_worker)} | ({"GPU": 1.0} if resources.gpu else {})
        field = "workers" if resources.min_workers is None else "min_workers"
        named = f"resources.{field}={getattr(resources, field)}"
        return cls(per_worker, job.world_sizes[0], named, 60 * resources.wait_minutes)

    def times(self, number: int) -> Needs:
        """Of so many jobs at a time."""
        return self._replace(workers=number * self.workers, field=f"{number} at a time with {self.field}")

    def __str__(self) -> str:
        each = " and ".join(f"{self.workers * number:g} {kind}s" for kind, number in self.per_worker.items())
        return f"{self.field} needs {each}, as {self.workers} x {_in_words(self.per_worker)}"

    def shortage(self, where: str) -> str:
        """That the machines at `where` are too few, in words."""
        machines = machines_there().values()
        total = {kind: sum(machine.get(kind, 0.0) for machine in machines) for kind in self.per_worker}
        there = " and ".join(f"{number:g} {kind}s" for kind, number in total.items())
        fits, many = room(self.per_worker, machines), "s" * (len(machines) != 1)
        return f"{self}; {where} has {there} on {len(machines)} machine{many}, which is room for {fits}"


def room(per_worker: Mapping[str, float], machines: Iterable[Mapping[str, float]]) -> int:
    """Workers that fit on machines, none across two."""
    return sum(
        min(int(machine.get(kind, 0.0) / number + 1e-9) for kind, number in per_worker.items() if number)
        for machine in machines
    )


def check_capacity(needs: Needs, where: str) -> None:
    """Refuse a job that does not fit on the machines that there are.

    Raises:
        ConfigError: with what is asked for, what there is and how many would fit.
    """
    if room(needs.per_worker, machines_there().values()) < needs.workers:
        raise ConfigError(f"{needs.shortage(where)}; Ray would wait for ever")


def wait_for_room(needs: Needs, where: str, notice: Callable[[str], None]) -> None:
    """Have an autoscaler bring machines, if there is one, until the job can start.

    Raises:
        ConfigError: no machine is on its way, or they have not come within `resources.wait_minutes`.
    """
    seen = len(machines := machines_there().values())
    if room(needs.per_worker, machines) >= needs.workers:
        return
    notice(f"waiting up to {needs.wait_s / 60:g} minutes for machines: {needs}")
    patience, begun, moved = Patience(needs), time.time(), time.monotonic()
    # Ray keeps one request for the whole cluster; its coordinator, which Ray Train asks too, adds up those of many.
    coordinator = DefaultAutoscalingCoordinator(f"tidegate-{secrets.token_hex(8)}")
    try:
        while room(needs.per_worker, machines := machines_there().values()) < needs.workers:
            # Of more than there can be none come, so not for more than it cannot do without.
            coordinator.request_resources([needs.per_worker] * needs.workers, expire_after_s=_ASKED_FOR_S)
            if patience.is_out():
                raise ConfigError(patience.said())
            if len(machines) != seen or _are_coming(begun):
                seen, moved = len(machines), time.monotonic()
            if time.monotonic() - moved > _QUIET_S:
                raise ConfigError(
                    f"{needs.shortage(where)}; no machine is on its way: there is no autoscaler, or no more "
                    "than that to be had"
                )
            time.sleep(_LOOK_EVERY_S)
    finally:
        coordinator.cancel_request()  # from here on Ray Train asks


class Patience:
    """How long machines may be missing; begins again whenever there are enough.

    Args:
        needs: of a job.
        without: ids of machines that do not count.
        clock: in seconds.
    """

    def __init__(self, needs: Needs, without: Sequence[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._needs, self._without, self._clock = needs, without, clock
        self._since: float | None = None

    def is_out(self) -> bool:
        if self._room() >= self._needs.workers:
            self._since = None
            return False
        if self._since is None:
            self._since = self._clock()
        return self._clock() - self._since > self._needs.wait_s

    def renew(self) -> None:
        """The workers are there."""
        self._since = None

    def said(self) -> str:
        """What is missing, in words."""
        return (
            f"resources.wait_minutes={self._needs.wait_s / 60:g}: the machines have not come; {self._needs}, and there "
            f"is room for {self._room()}. Look at the autoscaler (ray status) for a quota, a spot pool without "
            "machines or a wrong type"
        )

    def _room(self) -> int:
        return room(self._needs.per_worker, machines_there(self._without).values())


def machines_there(without: Sequence[str] = ()) -> dict[str, Mapping[str, float]]:
    """Resources of every machine that stays, by its id, but for some."""
    out = {*without, *(ray._private.state.state.get_draining_nodes() or {})}
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in out}


def _are_coming(begun: float) -> bool:
    """Whether an autoscaler starts machines, or has tried to since `begun`, in seconds since the epoch."""
    gcs = ray.get_runtime_context().gcs_address
    old = GcsClient(address=gcs).internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None)
    if old is not None:  # the first autoscaler's
        report = json.loads(old).get("autoscaler_report") or {}
        return any(report.get(kind) for kind in ("pending_launches", "pending_nodes", "failed_nodes"))
    status = get_cluster_status(gcs)
    failed = any((launch.failed_ts_s or 0) >= begun for launch in status.failed_launches)  # old ones are kept
    return bool(status.pending_launches or status.pending_nodes or failed)


def _in_words(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{number:g} {kind}" for kind, number in resources.items())
