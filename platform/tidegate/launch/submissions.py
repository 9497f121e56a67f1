"""Jobs on a Ray cluster by the name of their run: a name has one submission at a time, and as many as it takes.

Ray keeps what was submitted for as long as its head lives; the run itself is in the state directory and in MLflow.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import aiohttp
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.sdk import JobSubmissionClient
from ray.exceptions import AuthenticationError
from rich.console import Console
from rich.table import Table

from tidegate.config import ConfigError
from tidegate.launch.doctor import why_no_ray
from tidegate.redact import redact

__all__ = ["Cluster", "Submission", "follow", "list_jobs", "show_logs", "stop_job"]

STOP_WAIT_S = 600
"""How long a job that is stopped may take for its last step and checkpoint before Ray kills it."""
_AGENT_TIMEOUT_S, _ANSWER_TIMEOUT_S = 60.0, 60.0
_NAME, _STATE = "tidegate.name", "tidegate.state"


class Submission(NamedTuple):
    """One submission of a run."""

    id: str
    """Ray's: the name, a dot and the number of the attempt."""
    name: str
    state: str
    """The state directory there."""
    status: JobStatus
    message: str
    begun: float
    """Seconds since the epoch."""
    ended: float | None
    own_status: int | None
    """The exit status of its command, such as 124 at a limit; None where it has none."""

    @property
    def exit_status(self) -> int:
        """For a shell: 0 of what runs or ended well, 143 of what was stopped, else its own."""
        if self.running or self.status == JobStatus.SUCCEEDED:
            return 0
        return 143 if self.status == JobStatus.STOPPED else self.own_status or 1

    @property
    def running(self) -> bool:
        return not self.status.is_terminal()

    @property
    def attempt(self) -> int:
        """Counted from one."""
        return int(self.id.rpartition(".")[2])


class _Client(JobSubmissionClient):
    """Waits for an answer, but not for ever."""

    def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": _ANSWER_TIMEOUT_S, **settings})


class Cluster:
    """The Jobs API of a Ray cluster.

    Args:
        address: of its dashboard, `http(s)://host:port`; None takes RAY_API_SERVER_ADDRESS.

    Raises:
        ConfigError: none is given, none answers, or it wants a token.
    """

    def __init__(self, address: str | None) -> None:
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address or not re.match(r"https?://", address):
            raise ConfigError(
                f"--address {address}: name the cluster's dashboard, as http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
            )
        self.address = address
        problem = why_no_ray(address)
        if problem:
            raise ConfigError(f"--address {address}: no Ray cluster answers ({problem})")
        with self.explained():
            self.client = _Client(address)

    def submissions(self) -> list[Submission]:
        """All of Tidegate's, the oldest first."""
        with self.explained():
            jobs = self.client.list_jobs()
        found = [_submission(job) for job in jobs if job.submission_id and _NAME in (job.metadata or {})]
        return sorted(found, key=lambda submission: submission.begun)

    def latest(self, name: str) -> Submission | None:
        """The newest of a run."""
        return next((found for found in reversed(self.submissions()) if found.name == name), None)

    def known(self, name: str) -> Submission:
        """`latest`, or an error that lists what there is."""
        found = self.latest(name)
        if found is None:
            names = sorted({submission.name for submission in self.submissions()})
            raise ConfigError(
                f"{name}: nothing of that name at {self.address}; there are: {', '.join(names) or 'none'}"
            )
        return found

    def submission(self, submission_id: str) -> Submission:
        """As it is now."""
        return _submission(self._info(submission_id))

    def _info(self, submission_id: str) -> Any:
        with self.explained():
            return self.client.get_job_info(submission_id)

    def submit(
        self, name: str, before: Submission | None, state: str, entrypoint: str, runtime_env: dict[str, Any]
    ) -> str:
        """Hand a job to Ray, after the submission `before` of its name; returns the new one's id.

        Raises:
            ConfigError: Ray refuses, or another submission of that name was faster.
        """
        attempt = 1 + (before.attempt if before else 0)
        return self._submit(
            entrypoint=entrypoint,
            submission_id=f"{name}.{attempt}",  # Ray refuses one that it has seen: two cannot both be the next
            runtime_env=runtime_env,
            metadata={_NAME: name, _STATE: state},
        )

    def ask(self, entrypoint: str, timeout_s: float) -> str:
        """Run a command on the head and return what it prints.

        Raises:
            ConfigError: it fails, or does not end in time.
        """
        probe = self._submit(entrypoint=entrypoint)
        until = time.monotonic() + timeout_s
        while not (info := self._info(probe)).status.is_terminal():
            if time.monotonic() > until:
                self.client.stop_job(probe)
                raise ConfigError(
                    f"--address {self.address}: the head has not run a small command within {timeout_s:.0f} s "
                    f"({info.status.lower()}: {info.message}); it may have no room, or no worker process starts"
                )
            time.sleep(0.5)
        with self.explained():
            printed = self.client.get_job_logs(probe)
            self.client.delete_job(probe)
        if info.status != JobStatus.SUCCEEDED:
            raise ConfigError(
                f"--address {self.address}: a command fails on the head: {printed[-500:] or info.message}"
            )
        return printed

    def _submit(self, **job: Any) -> str:
        until = time.monotonic() + _AGENT_TIMEOUT_S
        while True:
            try:
                with self.explained():
                    return self.client.submit_job(**job)
            except ConfigError as error:
                # A head answers some seconds before it can run anything.
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.5)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What the client raises in the block, as a ConfigError that names the address."""
        try:
            yield
        except (AuthenticationError, RuntimeError, OSError, aiohttp.ClientError, ValueError) as error:
            said = str(error).strip() or type(error).__name__
            if isinstance(error, AuthenticationError):
                said = "it does not know you; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's"
            raise ConfigError(f"--address {self.address}: {said.splitlines()[-1][:500]}") from error


def _submission(job: Any) -> Submission:
    return Submission(
        id=job.submission_id,
        name=job.metadata[_NAME],
        state=job.metadata.get(_STATE, ""),
        status=job.status,
        message=job.message or "",
        begun=(job.start_time or 0) / 1000,
        ended=job.end_time / 1000 if job.end_time else None,
        own_status=job.driver_exit_code,
    )


def list_jobs(address: str | None) -> None:
    """Print the newest submission of every name."""
    table = Table("name", "status", "attempts", "begun", "took", "state directory", "")
    submissions = Cluster(address).submissions()
    newest = {submission.name: submission for submission in submissions}
    for name, last in newest.items():
        took = timedelta(seconds=round((last.ended or time.time()) - last.begun))
        attempts = sum(submission.name == name for submission in submissions)
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.begun))
        message = "" if last.status in (JobStatus.RUNNING, JobStatus.SUCCEEDED) else redact(last.message)
        table.add_row(name, last.status.lower(), str(attempts), begun, str(took), last.state, message)
    Console(highlight=False).print(table)


def show_logs(address: str | None, name: str, *, wait: bool) -> int:
    """Print what a run's newest submission printed; with `wait`, until it ends. Returns an exit status."""
    cluster = Cluster(address)
    submission = cluster.known(name)
    if wait and submission.running:
        return follow(cluster, submission.id)
    with cluster.explained():
        print(cluster.client.get_job_logs(submission.id), end="")
    return submission.exit_status


def follow(cluster: Cluster, submission_id: str) -> int:
    """Print a submission's output until it ends, and return its exit status; Ctrl-C leaves it alone."""

    async def tail() -> None:
        async for lines in cluster.client.tail_job_logs(submission_id):
            print(lines, end="", flush=True)

    name = submission_id.rpartition(".")[0]
    try:
        with cluster.explained():
            asyncio.run(tail())
        while (found := cluster.submission(submission_id)).running:
            time.sleep(0.5)  # its output ends before it does
    except KeyboardInterrupt:
        print(f"\n{name} goes on; see it with: tidegate logs {name} --wait; stop it with: tidegate stop {name}")
        return 130
    except ConfigError as error:
        raise ConfigError(f"{error}; {name} goes on there: tidegate logs {name} --wait") from error
    if found.status != JobStatus.SUCCEEDED:
        print(f"{name}: {found.status.lower()}: {redact(found.message)}", file=sys.stderr)
    return found.exit_status


def stop_job(address: str | None, name: str) -> int:
    """Ask a run to save and end, and wait until it has. Returns an exit status."""
    cluster = Cluster(address)
    submission = cluster.known(name)
    if not submission.running:
        print(f"{name} has ended already: {submission.status.lower()}")
        return 0
    with cluster.explained():
        cluster.client.stop_job(submission.id)
    print(f"{name} ends its step and saves")
    until = time.monotonic() + STOP_WAIT_S + 30
    while (found := cluster.submission(submission.id)).running:
        if time.monotonic() > until:
            raise ConfigError(f"{name} has not ended within {STOP_WAIT_S} s; see tidegate logs {name}")
        time.sleep(0.5)
    print(f"{name}: {found.status.lower()}; go on with: tidegate resume {name}, or submit it again")
    return 0
