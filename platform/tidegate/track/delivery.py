"""Sending records to a store so that each arrives once, also when an answer was lost.

A request that fails may still have been carried out. A run's records have distinct times and each ends in the
metric `tokens`, written in the same transaction as the rest of its request; so the history of that one metric says
which records a store already has, whatever became of the answers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tidegate.config import ConfigError
from tidegate.metric_path import without_details
from tidegate.redact import redact
from tidegate.track.client import connect, database_file, one_line
from tidegate.track.details import details_of, file_of
from tidegate.track.spool import TOKENS, Record, Spool, read_spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit

_log = logging.getLogger(__name__)


class Rejection(NamedTuple):
    """A record that the store will never take (an illegal metric name, a deleted run), and its reason."""

    record: Record
    reason: str


class Sender:
    """Writes records to one run; connects at the first use. Every method raises what MLflow raises."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._connected: MlflowClient | None = None

    def send(self, records: Sequence[Record]) -> None:
        """Write records, in order, in as few requests as MLflow allows (one, for what `next_batch` chose).

        Their details go before them, best effort: where a record has arrived, its details have or cannot.
        """
        from mlflow.entities import Metric

        metrics = (
            Metric(key, value, record.timestamp_ms, record.step)
            for record in records
            for key, value in without_details(record.metrics).items()
        )
        failure = self._send_details(records)
        while chunk := list(islice(metrics, MAX_METRICS_PER_REQUEST)):
            self._client.log_batch(self._run_id, metrics=chunk, synchronous=True)
        if failure is not None:
            where, why = redact(self._uri), one_line(failure)
            _log.warning("%s takes metrics, but no files: those of single experts and heads are lost (%s)", where, why)

    def _send_details(self, records: Sequence[Record]) -> Exception | None:
        try:
            for record in records:
                if details := details_of(record):
                    self._client.log_text(self._run_id, json.dumps(details), file_of(record))
        except Exception as error:  # whatever MLflow and a storage's client raise
            return error
        return None

    def arrived(self) -> set[int]:
        """The times of the records that the store has, in milliseconds."""
        return {metric.timestamp for metric in self._client.get_metric_history(self._run_id, TOKENS)}

    def upload(self, path: Path, folder: str | None) -> None:
        """Store a file as an artifact."""
        self._client.log_artifact(self._run_id, str(path), folder)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._client.set_tag(self._run_id, key, value)

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:
            database = database_file(self._uri)
            if database and not database.exists():  # MLflow would create an empty one, on the wrong machine
                raise FileNotFoundError(f"no store {database} here; runs over several machines need an MLflow server")
            self._connected = connect(self._uri)
        return self._connected


def next_batch(records: Iterable[Record]) -> list[Record]:
    """As many of the first records as fit into one request, at least one if there is any."""
    batch: list[Record] = []
    size = 0
    for record in records:
        size += len(record.metrics)
        if batch and size > MAX_METRICS_PER_REQUEST:
            break
        batch.append(record)
    return batch


def deliver(sender: Sender, batch: Sequence[Record]) -> list[Rejection]:
    """Send a batch, setting aside what the store rejects: a request with one bad record fails as a whole, so halve it.

    Raises:
        Exception: the store did not answer; any part of the batch may have arrived.
    """
    try:
        sender.send(batch)
    except Exception as error:
        if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
            raise
        if len(batch) == 1:
            return [Rejection(batch[0], one_line(error))]
        middle = len(batch) // 2
        return deliver(sender, batch[:middle]) + deliver(sender, batch[middle:])
    return []


def replay_spool(path: Path, uri: str) -> int:
    """Deliver a spool that a closed logger left, then remove the file. What has arrived before is not sent again.

    Args:
        path: the spool file; its first line names the run.
        uri: of the store that has the run.

    Returns:
        The number of records delivered now.

    Raises:
        ConfigError: the file is no spool, the store does not answer, or it rejects records (these stay in the file).
    """
    try:
        run_id, records, _ = read_spool(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot replay {path}: {one_line(error)}") from error
    sender = Sender(uri, run_id)
    try:
        arrived = sender.arrived()
        missing = [record for record in records if record.timestamp_ms not in arrived]
        rejections = [rejection for batch in _batches(missing) for rejection in deliver(sender, batch)]
    except Exception as error:  # MLflow lets errors of requests, SQLAlchemy and the file system through
        raise ConfigError(f"cannot replay {path} to {redact(uri)}: {one_line(error)}") from error
    Spool(path, run_id).replace([rejection.record for rejection in rejections])
    if rejections:
        count = f"{len(rejections)} of {len(missing)} records"
        raise ConfigError(f"{redact(uri)} rejects {count}, they stay in {path}: {rejections[0].reason}")
    return len(missing)


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    rest = records
    while batch := next_batch(rest):
        yield batch
        rest = rest[len(batch) :]
