"""Step metrics from rank 0, off the critical path: a dead tracking server costs a training nothing.

`log` appends to a list. A daemon thread delivers the list every few seconds. While the store does not answer, the
records wait in memory and in a spool file, and delivery is tried again after 1, 2, 4 .. 60 s; they are sent in the
order in which they were logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tidegate.redact import redact
from tidegate.track.client import import_mlflow, one_line
from tidegate.track.delivery import Rejection, Sender, deliver, next_batch
from tidegate.track.spool import TOKENS, Record, Spool

__all__ = ["Delivery", "MetricLogger"]

LONGEST_BACKOFF_S = 60.0
CLOSING_RETRY_S = 0.5  # close() has little time, so it does not back off
ATTEMPTS = 3  # at an artifact or a tag

_log = logging.getLogger(__name__)


class Delivery(NamedTuple):
    """What became of the records (calls of `log`) of one logger."""

    delivered: int
    """Records that the store acknowledged, those of an adopted spool included."""
    undelivered: int
    """Records that it did not acknowledge in time, or rejected."""
    spool: Path | None
    """Holds exactly the undelivered ones, for `replay_spool`; None without any, or when the disk refused it."""


class _Errand(NamedTuple):
    """Something to store beside metrics, best effort."""

    what: str
    act: Callable[[Sender], None]
    attempt: int = 1


class MetricLogger:
    """Writes the metrics of one run to its store in the background.

    A spool that an earlier process of the same run left at `spool` is taken over: its records go first.

    Args:
        uri: of the store, as in the run's handle.
        run_id: of a run that exists.
        spool: the file for records that cannot be delivered; one per run and rank, on a disk that survives.
        flush_every_s: seconds between two deliveries.

    Raises:
        ConfigError: `spool` holds another run's records, or is no spool.
    """

    def __init__(self, uri: str, run_id: str, *, spool: Path, flush_every_s: float = 2.0) -> None:
        import_mlflow()  # here and not in the thread, where it would race with the caller's own imports
        self._uri = uri
        self._flush_every_s = flush_every_s
        self._sender = Sender(uri, run_id)
        self._spool = Spool(Path(spool), run_id)

        # Guards all that `log`, `close` and the thread share; held for list operations only, never for I/O.
        self._lock = threading.Lock()
        self._inbox: list[Record] = []
        self._adopted: list[Record] = []
        self._pending = deque(self._spool.load())
        self._rejected: list[Record] = []
        self._errands: deque[_Errand] = deque()
        self._delivered = 0
        self._last_ms = self._pending[-1].timestamp_ms if self._pending else 0
        self._closing = False
        self._abandoned = False

        # The thread's own.
        self._failures = 0
        self._next_attempt = 0.0
        self._unsure = bool(self._pending)
        """Some pending records may have arrived without an answer."""
        self._spooled_ms = self._last_ms
        """Records up to this time are in the spool file."""

        self._spool_lock = threading.Lock()
        self._spool_broken = False
        self._close_lock = threading.Lock()
        self._delivery: Delivery | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"metrics-{run_id[:8]}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], *, step: int, tokens: int) -> None:
        """Record metrics; returns at once, whatever state the server is in.

        Args:
            metrics: name to value, as Python numbers (a tensor would cost a device sync here). NaN is kept; MLflow
                stores an infinity as the largest float.
            step: the optimizer step.
            tokens: training tokens seen so far; stored as the metric `tokens`, to read every other one against.

        Raises:
            RuntimeError: the logger is closed.
        """
        values = {name: float(value) for name, value in metrics.items() if name != TOKENS}
        values[TOKENS] = float(tokens)
        now_ms = time.time_ns() // 1_000_000
        with self._lock:
            self._refuse_if_closed()
            self._last_ms = max(now_ms, self._last_ms + 1)  # distinct and rising, also when the clock is set back
            self._inbox.append(Record(self._last_ms, step, values))

    def unsent(self) -> list[dict[str, Any]]:
        """The records that the store has not acknowledged, as plain values for a checkpoint."""
        with self._lock:
            waiting = {record.timestamp_ms: record for record in [*self._adopted, *self._pending, *self._inbox]}
        return [waiting[time_ms]._asdict() for time_ms in sorted(waiting)]

    def adopt(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Deliver also what `unsent` gave in an earlier process of this run; what arrived since is not sent twice."""
        with self._lock:
            self._refuse_if_closed()
            self._adopted = [Record(r["timestamp_ms"], r["step"], dict(r["metrics"])) for r in records]
            self._last_ms = max([self._last_ms, *(record.timestamp_ms for record in self._adopted)])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact under `folder`, best effort: a failure is logged as a warning.

        Raises:
            RuntimeError: the logger is closed.
        """
        with self._lock:
            self._refuse_if_closed()
            self._errands.append(_Errand(f"artifact {path}", lambda sender: sender.upload(Path(path), folder)))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run, best effort: a failure is logged as a warning.

        Raises:
            RuntimeError: the logger is closed.
        """
        with self._lock:
            self._refuse_if_closed()
            self._errands.append(_Errand(f"tag {key}", lambda sender: sender.tag(key, value)))

    def close(self, timeout_s: float = 30.0) -> Delivery:
        """Deliver what can be delivered, leave the rest in the spool file. Later calls return the same answer.

        Args:
            timeout_s: seconds to wait for the store.
        """
        with self._close_lock:
            if self._delivery is None:
                self._delivery = self._finish(timeout_s)
            return self._delivery

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_if_closed(self) -> None:
        if self._closing:
            raise RuntimeError("this MetricLogger is closed")

    def _finish(self, timeout_s: float) -> Delivery:
        with self._lock:
            self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        with self._lock:
            self._abandoned = True  # a request still under way is no longer counted; a replay finds out
            left = [*self._rejected, *self._adopted, *self._pending, *self._inbox]
            errands = [errand.what for errand in self._errands]
            delivered = self._delivered
        self._stop.set()
        with self._spool_lock:
            kept = self._write_spool(lambda: self._spool.replace(left))
        if errands:
            _log.warning("not stored at %s: %s", self._where, ", ".join(errands))
        if left:
            _log.warning("%s did not take %d metric records; spool: %s", self._where, len(left), self._spool.path)
        return Delivery(delivered, len(left), self._spool.path if left and kept else None)

    # --- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._abandoned:
            if self._closing:
                self._stop.wait(CLOSING_RETRY_S if self._failures else 0)
            else:
                self._wake.wait(self._flush_every_s)
            with self._lock:
                closing = self._closing  # read with the inbox: nothing is logged after it
                self._take_adopted()
                self._pending.extend(self._inbox)
                self._inbox.clear()
            if self._failures:
                self._spool_pending()
            if closing or time.monotonic() >= self._next_attempt:
                self._deliver_pending()
            with self._lock:
                if closing and not self._pending and not self._errands:
                    return

    def _take_adopted(self) -> None:
        known = {record.timestamp_ms for record in self._pending}
        fresh = [record for record in self._adopted if record.timestamp_ms not in known]
        self._adopted.clear()
        if fresh:
            self._pending = deque(sorted([*fresh, *self._pending], key=lambda record: record.timestamp_ms))
            self._unsure = True

    def _deliver_pending(self) -> None:
        try:
            if self._unsure:
                self._drop_arrived(self._sender.arrived())
            while batch := self._next_batch():
                rejections = deliver(self._sender, batch)
                self._acknowledge(batch, rejections)
        except Exception as error:  # whatever MLflow raises, a training must not end by its metrics
            self._fail(error)
            return
        if self._failures or self._spooled_ms:
            self._recover()
        self._run_errands()

    def _next_batch(self) -> list[Record]:
        with self._lock:
            return [] if self._abandoned else next_batch(self._pending)

    def _drop_arrived(self, arrived: set[int]) -> None:
        waiting = deque(record for record in self._pending if record.timestamp_ms not in arrived)
        with self._lock:
            if not self._abandoned:
                self._delivered += len(self._pending) - len(waiting)
                self._pending = waiting
        self._unsure = False

    def _acknowledge(self, batch: list[Record], rejections: list[Rejection]) -> None:
        rejected = [rejection.record for rejection in rejections]
        with self._lock:
            if self._abandoned:
                return
            for _ in batch:
                self._pending.popleft()
            self._rejected.extend(rejected)
            self._delivered += len(batch) - len(rejected)
        if rejections:
            _log.warning("%s rejects %d metric records: %s", self._where, len(rejections), rejections[0].reason)
            self._append_to_spool(rejected)

    def _fail(self, error: Exception) -> None:
        if self._failures == 0:
            _log.warning(
                "%s does not take metrics (%s); they wait in %s and are sent when it does",
                self._where,
                one_line(error),
                self._spool.path,
            )
        self._next_attempt = time.monotonic() + min(2.0**self._failures, LONGEST_BACKOFF_S)
        self._failures = min(self._failures + 1, 10)  # 2 ** 10 s is far beyond the longest backoff
        self._unsure = True
        self._spool_pending()

    def _recover(self) -> None:
        if self._failures:
            _log.info("%s takes metrics again", self._where)
        self._failures = 0
        with self._spool_lock:
            if not self._abandoned:
                self._write_spool(lambda: self._spool.replace(self._rejected))
        self._spooled_ms = 0

    def _run_errands(self) -> None:
        with self._lock:
            waiting = [] if self._abandoned else list(self._errands)
        for errand in waiting:
            failure = None
            try:
                errand.act(self._sender)
            except Exception as error:  # best effort, as promised
                failure = one_line(error)
            with self._lock:
                if self._abandoned:
                    return
                self._errands.popleft()
                if failure and errand.attempt < ATTEMPTS:
                    self._errands.append(errand._replace(attempt=errand.attempt + 1))
            if failure and errand.attempt >= ATTEMPTS:
                _log.warning("%s was not stored at %s: %s", errand.what, self._where, failure)

    # --- the spool -------------------------------------------------------------------------------------------

    def _spool_pending(self) -> None:
        with self._lock:
            fresh = list(takewhile(lambda record: record.timestamp_ms > self._spooled_ms, reversed(self._pending)))
        self._append_to_spool(fresh[::-1])

    def _append_to_spool(self, records: list[Record]) -> None:
        fresh = [record for record in records if record.timestamp_ms > self._spooled_ms]
        if not fresh:
            return
        with self._spool_lock:
            if self._abandoned:
                return
            if self._spool_broken:  # a full disk may have left half a line, which an append would continue
                kept = self._write_spool(lambda: self._spool.replace([*self._rejected, *self._pending]))
            else:
                kept = self._write_spool(lambda: self._spool.append(fresh))
            if kept:
                self._spooled_ms = fresh[-1].timestamp_ms

    def _write_spool(self, write: Callable[[], None]) -> bool:
        """Whether the disk took it; if not, the records stay in memory."""
        try:
            write()
        except OSError as error:
            if not self._spool_broken:
                _log.warning("cannot write metric spool %s: %s", self._spool.path, error)
            self._spool_broken = True
        else:
            self._spool_broken = False
        return not self._spool_broken

    @property
    def _where(self) -> str:
        return redact(self._uri)
