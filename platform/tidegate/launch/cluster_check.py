"""Whether every node of a Ray cluster can take part in a job: `tidegate doctor --cluster`, and before each job.

One small actor a node looks at it, without a CPU of its own, all at once and for a bounded time. A node that is not
like the machine that asks, or that cannot be used, is named. docs/preflight.md says what is looked at.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from tidegate.config import ConfigError
from tidegate.launch.cluster_links import Link, measure_links
from tidegate.launch.cluster_nodes import Node, nodes_alive
from tidegate.launch.doctor import LITTLE_SPACE_BYTES, Finding, show_findings
from tidegate.launch.node_report import ASKED, CODE, PYTHON, NodeReport, Wanted, report, versions
from tidegate.launch.ray_train import join
from tidegate.launch.versions import mismatches
from tidegate.redact import redact
from tidegate.track import TrackConfig, resolve_tracking_uri
from tidegate.train.job import Job
from tidegate.train.nvml import GpuState
from tidegate.train.storage import Storage

__all__ = ["examine_cluster", "unfit_nodes"]

ANSWER_WITHIN_S = 60.0
"""A node's report; it takes seconds, most of them for the worker process to start."""
_PINGS, _PING_WITHIN_S = 5, 5.0
_LITTLE_MEMORY_BYTES = 2 * 10**9
_SKEW_WARN_S, _SKEW_FAIL_S = 1.0, 60.0
"""Records of a run carry their machine's time; object stores refuse requests of a clock that is far off."""
_SLOW_CLOCK = 0.8
"""Of a GPU at work, as a share of its highest clock."""


class Seen(NamedTuple):
    """A node that answered."""

    report: NodeReport
    clock_s: float
    """Its clock less this machine's."""
    within_s: float
    """Of which that is sure: half of the fastest round trip."""


def examine_cluster(address: str, state: Path, storage: str | None, expected_gb_per_s: Mapping[str, Link]) -> bool:
    """Print a table of a cluster's nodes.

    Args:
        address: of the cluster, as Ray takes it.
        state: the state directory, which all nodes must share.
        storage: folder or URI of checkpoints beside it, if any.
        expected_gb_per_s: of links, by a part of the GPU's name.

    Returns:
        False if a check says FAIL.

    Raises:
        ConfigError: no Ray answers, or this machine cannot write to what is shared.
    """
    join(address)
    nodes = nodes_alive()
    tracking = resolve_tracking_uri(TrackConfig(), state)
    seen = _survey(nodes, [str(state), *([storage] if storage else [])], tracking)
    judged = _judge(seen)
    kinds = {
        node: found.report.gpus[0].name if found.report.gpus else ""
        for node, found in seen.items()
        if isinstance(found, Seen)
    }
    links = measure_links(kinds, expected_gb_per_s)
    rows = [(str(node), row) for node in nodes for row in _rows([*judged[node.id], *links.of_node.get(node.id, [])])]
    return show_findings([*rows, *(("all nodes", finding) for finding in links.of_all)])


def unfit_nodes(
    job: Job, address: str, folders: Sequence[str], tracking: str, notice: Callable[[str], None], trials: int = 1
) -> tuple[str, ...]:
    """Ids of the nodes that should get no workers of a job which begins on several; says why.

    Args:
        folders: that all nodes must share; URIs too.
        tracking: URI of MLflow.
        trials: of the job, that begin at a time.

    Raises:
        ConfigError: the job does not fit on the others, not once.
    """
    nodes = nodes_alive()
    useful = [node for node in nodes if node.room(job)]
    if job.resources.workers * trials == 1 or len(useful) < 2:
        return ()
    heads = [node for node in nodes if node.is_head and node not in useful]  # for its clock
    judged = _judge(_survey([*useful, *heads], folders, tracking))
    said = {
        node: "; ".join(finding.found for finding in judged[node.id] if finding.status == "FAIL") for node in useful
    }
    unfit = [node for node in useful if said[node]]
    why = redact(" | ".join(f"{node}: {said[node]}" for node in unfit))
    left = sum(node.room(job) for node in useful if node not in unfit)
    if unfit and left < job.world_sizes[0]:
        field = "workers" if job.resources.min_workers is None else "min_workers"
        raise ConfigError(
            f"--address {address}: {why}. Without that, resources.{field}={getattr(job.resources, field)} does not "
            f"fit: there is room for {left} workers"
        )
    if unfit:
        notice(f"left out: {why}")
    return tuple(node.id for node in unfit)


@ray.remote(num_cpus=0)
class _Scout:
    def report(self, wanted: Wanted, me: str) -> NodeReport:
        return report(wanted, me)

    def clock(self) -> float:
        return time.time()


def _survey(nodes: Sequence[Node], folders: Sequence[str], tracking: str) -> dict[Node, Seen | str]:
    """What each node says of itself, or why it says nothing."""
    mark = f"preflight-{secrets.token_hex(8)}"
    for folder in folders:
        Storage(folder).replace(f"{mark}/{ASKED}", mark.encode())
    wanted = Wanted(tuple(folders), mark, tracking)
    scouts: dict[Node, Any] = {}
    try:
        for node in nodes:
            scouts[node] = _Scout.options(scheduling_strategy=node.here()).remote()  # type: ignore[attr-defined]
        answers = {scout.report.remote(wanted, node.id): node for node, scout in scouts.items()}
        ray.wait([*answers], num_returns=len(answers), timeout=ANSWER_WITHIN_S)
        seen = {node: _seen(scouts[node], answer) for answer, node in answers.items()}
        return {node: _missing(found, folders, f"{mark}/{node.id}") for node, found in seen.items()}
    finally:
        for scout in scouts.values():
            ray.kill(scout)
        for folder in folders:
            Storage(folder).delete(mark)


def _seen(scout: Any, answer: Any) -> Seen | str:
    try:
        found = ray.get(answer, timeout=0)
        trips = []
        for _ in range(_PINGS):
            begun = time.time()
            there = ray.get(scout.clock.remote(), timeout=_PING_WITHIN_S)
            ended = time.time()
            trips.append((ended - begun, there - (begun + ended) / 2))
    except ray.exceptions.GetTimeoutError:
        return f"does not answer (waited {ANSWER_WITHIN_S:.0f} s)"
    except ray.exceptions.RayError as error:
        return f"could not be looked at: {str(error).strip().splitlines()[-1]}"
    round_trip_s, clock_s = min(trips)
    return Seen(found, clock_s, round_trip_s / 2)


def _missing(found: Seen | str, folders: Sequence[str], name: str) -> Seen | str:
    """With what a node wrote and this machine does not see."""
    if isinstance(found, str):
        return found
    troubles = dict(found.report.folders)
    for folder in folders:
        if not troubles[folder]:
            try:
                Storage(folder).read(name)
            except FileNotFoundError:
                troubles[folder] = "what it writes is not seen by this machine"
    return found._replace(report=found.report._replace(folders=troubles))


def _judge(seen: Mapping[Node, Seen | str]) -> dict[str, list[Finding]]:
    """Findings on every node, by its id."""
    clocks = {node.is_head: found.clock_s for node, found in seen.items() if isinstance(found, Seen)}
    head_s, here = clocks.get(True, 0.0), versions()
    return {
        node.id: [Finding("FAIL", found, "look at its raylet and its machine; restart or remove it")]
        if isinstance(found, str)
        else [*_of_software(found.report, here), *_of_clock(found, head_s), *_of_machine(found.report)]
        for node, found in seen.items()
    }


def _of_software(found: NodeReport, here: Mapping[str, str]) -> Iterator[Finding]:
    packages, there = {name: here[name] for name in here.keys() - {CODE, PYTHON}}, found.versions
    wrong = [*mismatches(dict(sorted(packages.items())), here[PYTHON], there, there[PYTHON])]
    if there[CODE] != here[CODE]:
        wrong.append(f"{CODE} {there[CODE]}, here {here[CODE]}")
    if wrong:
        yield Finding("FAIL", ", ".join(wrong), "give all nodes one image")
    else:
        yield Finding("ok", "versions as here")
    for folder, trouble in found.folders.items():
        if trouble:
            yield Finding("FAIL", f"{folder} {trouble}", "mount one folder on all nodes, or take an object store")
        else:
            yield Finding("ok", f"{folder} is shared")
    reached = found.tracking.startswith("reachable")
    fix = "" if reached else "set MLFLOW_TRACKING_URI to a server that all nodes reach"
    yield Finding("ok" if reached else "FAIL", f"MLflow {found.tracking}", fix)
    said = f"RAY_AUTH_MODE={found.auth}" if found.auth else "RAY_AUTH_MODE is not set"
    if found.auth == "token":
        yield Finding("ok", said)
    else:
        yield Finding("warn", said, "start Ray with RAY_AUTH_MODE=token (docs/security.md)")


def _of_clock(found: Seen, head_s: float) -> Iterator[Finding]:
    skew_s = found.clock_s - head_s
    sure_s = abs(skew_s) - found.within_s
    status = "FAIL" if sure_s > _SKEW_FAIL_S else "warn" if sure_s > _SKEW_WARN_S else "ok"
    said = f"clock {skew_s:+.3f} s from the head's (within {found.within_s:.3f} s)"
    yield Finding(status, said, "" if status == "ok" else "run chrony or another time service on it")  # type: ignore[arg-type]


def _of_machine(found: NodeReport) -> Iterator[Finding]:
    for kind, free, little in (
        ("disk", found.disk_bytes, LITTLE_SPACE_BYTES),
        ("memory", found.memory_bytes, _LITTLE_MEMORY_BYTES),
    ):
        short = free < little
        yield Finding("warn" if short else "ok", f"{free / 1e9:.1f} GB of {kind} free", "free some" if short else "")
    for index, gpu in enumerate(found.gpus):
        yield _of_gpu(f"GPU {index}", gpu)


def _of_gpu(name: str, gpu: GpuState) -> Finding:
    said = f"{name}: {gpu.name}, driver {gpu.driver}, {gpu.clock_mhz} of {gpu.max_clock_mhz} MHz"
    if gpu.uncorrected_errors:
        errors = f"{said}, {gpu.uncorrected_errors} uncorrected ECC errors since its machine started"
        return Finding("FAIL", errors, "reset the GPU or restart its machine; replace it if they come back")
    if gpu.slowed_by:
        return Finding("FAIL", f"{said}, slowed by {' and '.join(gpu.slowed_by)}", "look at its cooling and power")
    if not gpu.idle and gpu.clock_mhz and gpu.max_clock_mhz and gpu.clock_mhz < _SLOW_CLOCK * gpu.max_clock_mhz:
        return Finding("warn", f"{said} at work", "look at nvidia-smi -q -d CLOCK,PERFORMANCE")
    return Finding("ok", said)


def _rows(findings: Sequence[Finding]) -> Iterator[Finding]:
    """One row of all that is well, and one of each other thing."""
    well = [finding.found for finding in findings if finding.status == "ok"]
    if well:
        yield Finding("ok", "; ".join(well))
    yield from (finding for finding in findings if finding.status != "ok")
