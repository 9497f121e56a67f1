"""`report.html`: written beside training at evaluations and at the end, and by `tidegate report` at any time.

A thread of the driver writes it from the tracking store, so that training waits for nothing, and whatever goes wrong
with it is a warning. What metrics do not tell, the driver keeps in the run's folder and logs with the page: what the
run said, which experts held-out text used, and what the model wrote.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from tidegate.config import ConfigError
from tidegate.launch.state import RunFolder, StateDir, write_whole
from tidegate.redact import redact
from tidegate.track import (
    RunData,
    RunHandle,
    TrackConfig,
    find_run,
    log_file,
    log_text,
    recorded_uri,
    resolve_tracking_uri,
)
from tidegate.train.telemetry import Record

if TYPE_CHECKING:
    from tidegate.train.evaluate import Evaluation

__all__ = ["RunPage", "find_recorded", "write_report"]

PAGE_FILE = "report.html"
MAX_LOADS = 64
"""Evaluations whose expert loads and samples are kept; every second one, never the newest, goes when there are more."""
LAST_PAGE_S = 30.0
"""For which the end of a run waits for its last page."""

_log = logging.getLogger(__name__)


class RunPage:
    """Follows a run from its driver; a context, whose end writes the last page.

    Args:
        tracking: where the run is recorded.
        folder: of the run; a resumed run goes on with what is there.
        config: how often.
        enabled: false does nothing at all.
    """

    def __init__(self, tracking: RunHandle, folder: RunFolder, config: TrackConfig, *, enabled: bool = True) -> None:
        self._tracking, self._folder, self._config = tracking, folder, config
        self._enabled = enabled and config.page_every_s is not None
        self._step = 0
        self._wanted, self._ending = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of the files
        self._thread = threading.Thread(target=self._follow, name="run-page", daemon=True)

    def __enter__(self) -> RunPage:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._ending.set()
            self._wanted.set()
            self._thread.join(LAST_PAGE_S)

    def record(self, record: Record) -> None:
        """A record of the run; one of an evaluation asks for a page."""
        self._step = record.step
        if self._enabled and record.evaluation is not None:
            self._attempt(self._keep_loads, record.step, record.evaluation)
            self._attempt(self._keep_samples, record)
            self._wanted.set()

    def notice(self, line: str) -> None:
        """A line that the run said."""
        if self._enabled:
            self._attempt(self._keep_notice, line)

    def _follow(self) -> None:
        every_s = self._config.page_every_s
        assert every_s is not None
        next_s = time.monotonic() + every_s
        last = False
        while not last:
            self._wanted.wait()
            self._ending.wait(max(next_s - time.monotonic(), self._config.flush_every_s + 1))  # until metrics arrived
            self._wanted.clear()
            last = self._ending.is_set()  # after that: who ends the run in between sets `wanted` again
            self._attempt(self._write)
            next_s = time.monotonic() + every_s

    def _write(self) -> None:
        from tidegate.track.page import EVENTS_FILE, LOADS_FILE, SAMPLES_FILE, run_page

        run = find_run(self._tracking.uri, self._tracking.run_id)
        with self._lock:
            for name in (EVENTS_FILE, LOADS_FILE, SAMPLES_FILE):
                if (path := self._folder.folder / name).exists():
                    log_file(self._tracking, path)
        log_text(self._tracking, run_page(run), PAGE_FILE)

    def _keep_notice(self, line: str) -> None:
        from tidegate.track.page import EVENTS_FILE

        entry = {"time_ms": time.time_ns() // 1_000_000, "step": self._step, "text": redact(line)}
        with self._lock, (self._folder.folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _keep_loads(self, step: int, evaluation: Evaluation) -> None:
        from tidegate.track.page import LOADS_FILE, read_loads

        if evaluation.load_DLE is None:
            return
        path = self._folder.folder / LOADS_FILE
        load_1DLE = np.array([evaluation.load_DLE], dtype=np.float32)
        steps, load_SDLE = [step], load_1DLE
        kept = read_loads(path.read_bytes()) if path.exists() else None
        if kept is not None and kept.load_SDLE.shape[1:] == load_1DLE.shape[1:]:
            before = [place for place, at in enumerate(kept.steps) if at < step]  # a rollback comes here again
            steps = [*(kept.steps[place] for place in before), step]
            load_SDLE = np.concatenate([kept.load_SDLE[before], load_1DLE])
        if len(steps) > MAX_LOADS:
            steps, load_SDLE = steps[::-2][::-1], load_SDLE[::-2][::-1]
        partial = path.with_name("." + path.name)
        np.savez_compressed(partial, steps=steps, domains=np.array(evaluation.domains), load_SDLE=load_SDLE)
        with self._lock:
            partial.replace(path)

    def _keep_samples(self, record: Record) -> None:
        from tidegate.track.page import SAMPLES_FILE, read_samples

        if record.evaluation is None or not record.evaluation.samples:
            return
        path = self._folder.folder / SAMPLES_FILE
        kept = read_samples(path.read_bytes()) if path.exists() else []
        lines = [line for line in kept if line["step"] < record.step]  # a rollback comes here again
        at = {"step": record.step, "tokens": record.tokens}
        lines += [at | sample._asdict() for sample in record.evaluation.samples]
        steps = sorted({line["step"] for line in lines})
        if len(steps) > MAX_LOADS:
            lines = [line for line in lines if line["step"] in steps[::-2]]
        with self._lock:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))

    def _attempt(self, act: Any, *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:  # see the module docstring
            _log.warning("run %s: its page was not written: %s", self._tracking.name, redact(str(error)))


def write_report(run: str, state: StateDir, out: Path | None, store: str | None = None) -> Path:
    """Write the page of a run that `find_recorded` finds.

    Args:
        run: its name or MLflow id.
        out: the file; None: `RUN.html` in the current folder.
        state, store: as for `find_recorded`.

    Raises:
        ConfigError: there is no such run, its store cannot be read, or the file cannot be written.
    """
    found = find_recorded(run, state, store)
    from tidegate.track.page import run_page

    path = out or Path(f"{found.name.replace('/', '_')}.html")
    page = run_page(found)
    try:
        write_whole(path, page)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror})") from error
    return path


def find_recorded(run: str, state: StateDir, store: str | None = None) -> RunData:
    """A run by name or MLflow id: of this state directory, wherever it is tracked, else of the store in use.

    Args:
        run: its name or id.
        state: this state directory.
        store: URI of a store to look in instead; None: as above.

    Raises:
        ConfigError: there is none, or its store cannot be read.
    """
    if store is None and run in state.runs():
        record = state.run(run).read()
        return find_run(recorded_uri(record.tracking_uri), record.run_id)
    return find_run(resolve_tracking_uri(TrackConfig(tracking_uri=store), state.root), run)
