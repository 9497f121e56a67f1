"""Reading runs from a tracking store alone: also those of other machines, running, finished or crashed.

A store is a database URI or a server; `resolve_tracking_uri` says which one a state directory uses. Nothing here
writes to a store, creates one or migrates one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tidegate.config import ConfigError
from tidegate.metric_path import parse_metric
from tidegate.redact import redact
from tidegate.track import details
from tidegate.track.client import connect, database_file, is_database, one_line, schema_of
from tidegate.track.spool import TOKENS

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["RunData", "find_run", "find_runs"]

SYSTEM = "system/"
"""Metrics of machines begin so; MLflow's own monitor counts its samples, not steps."""
_OF_LAYERS = ("moe/", "attention/", "hidden/", SYSTEM)
_PAGE = 1000
_REQUESTS_AT_A_TIME = 16  # a server answers one metric's history a request
_LARGEST = float(np.finfo(np.float64).max)  # as which MLflow stores an infinity


class _Store(NamedTuple):
    uri: str
    client: MlflowClient


class RunData:
    """One run as its store has it when the object is made; histories and artifacts are read when asked for.

    Attributes:
        name: of the run.
        id: MLflow's, 32 hexadecimal digits.
        experiment: name of its experiment.
        status: RUNNING, FINISHED, FAILED or KILLED; a run whose process was killed stays RUNNING.
        start, end: UTC; `end` is None while it has not ended, also after a resume.
        tags, params: as logged; params are the flattened resolved job.
        metrics: last value of each, those of single experts, heads, bins and domains of a layer aside.
    """

    def __init__(self, store: _Store, run: Run, experiment: str) -> None:
        self._store = store
        self.uri: str = redact(store.uri)
        self.id: str = run.info.run_id
        self.name: str = run.info.run_name or run.info.run_id
        self.experiment = experiment
        self.status: str = run.info.status
        self.start = _time(run.info.start_time)
        # MLflow keeps the end of the start before a resume.
        has_ended = run.info.end_time and self.status != "RUNNING"
        self.end = _time(run.info.end_time) if has_ended else None
        self.tags: dict[str, str] = dict(run.data.tags)
        self.params: dict[str, str] = dict(run.data.params)
        self.metrics: dict[str, float] = {name: _restored(value) for name, value in run.data.metrics.items()}

        self._sample: int | None = None

    def __repr__(self) -> str:
        return f"RunData({self.name!r}, {self.id}, {self.status}, experiment {self.experiment!r})"

    def sampled(self, steps: int) -> RunData:
        """The same run, of whose layers only about so many steps are read, and as many evaluations.

        They are nearly all of a run's points: of 10,000 steps with 300 metrics of layers each, 3 million.
        """
        sample = copy(self)
        sample.__dict__.pop("points", None)
        sample._sample = steps
        return sample

    @cached_property
    def points(self) -> pd.DataFrame:
        """All that was logged, as `points_of` gives it; of a sampled run, what was chosen."""
        if self._sample is None:
            return _in_order([self.points_of(self.metrics.keys()), self._details()])
        of_layers = {name for name in self.metrics if name.startswith(_OF_LAYERS)}
        points = self.points_of(self.metrics.keys() - of_layers)
        keys = TOKENS, "val/loss", "train/loss"
        logged, evaluated, trained = (np.unique(points["step"][points["key"] == key]) for key in keys)
        some, evaluations = (
            steps[:: -max(-(-len(steps) // self._sample), 1)]  # from the last one back
            for steps in (logged, evaluated)
        )
        # What single experts do is recorded with evaluations only, by the first record of training from there on.
        after = np.searchsorted(trained, evaluations)
        details_at = trained[after[after < len(trained)]]
        chosen = {*some.tolist(), *evaluations.tolist(), *details_at.tolist()}
        return _in_order([points, self.points_of(of_layers, chosen), self._details(chosen)])

    def points_of(self, names: Set[str], steps: Collection[int] | None = None) -> pd.DataFrame:
        """What was logged of some metrics by time: columns `key`, `step`, `time_ms` (since 1970), `value`.

        Args:
            names: of the metrics.
            steps: at only these; None: at all.

        Raises:
            ConfigError: the store does not answer.
        """
        stored = self.metrics.keys() & names
        with _answering(self._store.uri):
            if is_database(self._store.uri):
                points = self._points_of_database(stored, steps)
            else:
                points = _table(self._points_of_server(stored))
                points = points if steps is None else points[points["step"].isin(steps)]
        points["value"] = points["value"].astype(float).replace({_LARGEST: np.inf, -_LARGEST: -np.inf})
        parts = [points]
        if any(parse_metric(name).is_detail for name in names - stored):
            found = self._details(steps)
            parts.append(found[found["key"].isin(names)])
        return _in_order(parts)

    def _details(self, steps: Collection[int] | None = None) -> pd.DataFrame:
        """As `points_of`: all that is in files of `track.details`."""
        if not self.artifacts(details.FOLDER):
            return _table([])
        with _answering(self._store.uri), TemporaryDirectory(prefix="tidegate-") as scratch:
            folder = Path(self._store.client.download_artifacts(self.id, details.FOLDER, scratch))
            return _table(details.points_in(folder.iterdir(), steps))

    def history(self, only: Collection[str] | None = None) -> pd.DataFrame:
        """The run as it stands: a row a step, the column `tokens`, then a column a metric; NaN where none was logged.

        Steps that were taken again after a resume or a rollback have their last values, and what was left behind for
        good is not there. What MLflow's own monitor logged (`system/`) is not either: its steps are another count.

        Args:
            only: reads these metrics alone, as far as the run has them; None: all.

        Raises:
            ConfigError: the store does not answer.
        """
        points = self.points if only is None else self.points_of({TOKENS, *only})
        table = _standing(points).pivot(index="step", columns="key", values="value").rename_axis(columns=None)
        others = [name for name in table.columns if name != TOKENS]
        return table.reindex(columns=[TOKENS, *others])

    def not_finite_from(self, metric: str) -> int | None:
        """The step from which a metric was NaN or infinite to the end; None if its last value is finite, or not there.

        Raises:
            ConfigError: the store does not answer.
        """
        points = _standing(self.points)
        values = points[points["key"] == metric].set_index("step")["value"].sort_index()
        finite_later = np.logical_or.accumulate(np.isfinite(values.to_numpy())[::-1])[::-1]
        steps = values.index[~finite_later]
        return int(steps[0]) if len(steps) else None

    def job(self) -> dict[str, Any] | None:
        """The resolved job of the first start; None for a run that recorded none."""
        return self._json("job/resolved.json")

    def changes(self) -> dict[str, Any] | None:
        """Flat `path -> value`: what the job changed against the one that it extends; None if none was recorded."""
        return self._json("job/changes.json")

    def artifacts(self, folder: str | None = None) -> list[str]:
        """Paths of the files in a folder of the run's artifacts, or at their top.

        Raises:
            ConfigError: the store does not answer.
        """
        with _answering(self._store.uri):
            return [entry.path for entry in self._store.client.list_artifacts(self.id, folder) if not entry.is_dir]

    def artifact(self, path: str) -> bytes | None:
        """An artifact's bytes; None if there is none.

        Raises:
            ConfigError: the store does not answer.
        """
        folder = path.rpartition("/")[0] or None
        if path not in self.artifacts(folder):
            return None
        with _answering(self._store.uri), TemporaryDirectory(prefix="tidegate-") as scratch:
            return Path(self._store.client.download_artifacts(self.id, path, scratch)).read_bytes()

    def _json(self, path: str) -> dict[str, Any] | None:
        text = self.artifact(path)
        if text is None:
            return None
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"run {self.name}: its artifact {path} is not JSON ({one_line(error)})") from error
        if not isinstance(document, dict):
            raise ConfigError(f"run {self.name}: its artifact {path} is not a mapping")
        return document

    def _points_of_database(self, names: Collection[str], steps: Collection[int] | None) -> pd.DataFrame:
        """One query: 400 metrics of 1000 points each take 1.8 s on two cores, and 10 s by MLflow's query a metric."""
        import pandas as pd
        import sqlalchemy

        lists: dict[str, list[Any]] = {}
        query = "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = :run"
        if len(names) < len(self.metrics):  # without names for all: a statement takes only so many values
            query, lists["names"] = f"{query} AND key IN :names", [*names]
        if steps is not None:
            query, lists["steps"] = f"{query} AND step IN :steps", [*steps]
        expanding: list[Any] = [sqlalchemy.bindparam(name, expanding=True) for name in lists]
        statement = sqlalchemy.text(query).bindparams(*expanding)
        engine = sqlalchemy.create_engine(self._store.uri)
        try:
            with engine.connect() as connection:
                points = pd.read_sql(statement, connection, params={"run": self.id, **lists})
        finally:
            engine.dispose()
        points["value"] = points["value"].mask(points.pop("is_nan").astype(bool))
        return points.rename(columns={"timestamp": "time_ms"})

    def _points_of_server(self, names: Collection[str]) -> list[tuple[str, int, int, float]]:
        client = self._store.client

        def read(key: str) -> list[tuple[str, int, int, float]]:
            return [(key, m.step, m.timestamp, m.value) for m in client.get_metric_history(self.id, key)]

        with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
            return [point for series in pool.map(read, names) for point in series]


def _table(points: Iterable[details.Point]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(points, columns=["key", "step", "time_ms", "value"])
    return table.astype({"step": "int64", "time_ms": "int64", "value": float})


def _in_order(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([part for part in parts if len(part)] or parts[:1]).sort_values(
        "time_ms", kind="stable", ignore_index=True
    )


def _standing(points: pd.DataFrame) -> pd.DataFrame:
    """Points of the run as it stands: the last of each metric at each step, without what was left behind."""
    records = points[points["key"] == TOKENS]
    points = points[~points["key"].str.startswith(SYSTEM) | points["time_ms"].isin(records["time_ms"])]
    # A record is left behind if a later one is of an earlier step. The values of a record share its time.
    earliest_from_here = records["step"][::-1].cummin()[::-1]
    left_behind = records["time_ms"][records["step"] > earliest_from_here]
    return points[~points["time_ms"].isin(left_behind)].drop_duplicates(["step", "key"], keep="last")


def find_run(uri: str, run: str, *, experiment: str | None = None) -> RunData:
    """The run with this name or MLflow id.

    Args:
        uri: of the store, from `resolve_tracking_uri`.
        run: its name, as `tidegate train` prints it, or its MLflow id.
        experiment: looks there only; None: everywhere.

    Raises:
        ConfigError: there is none, it is deleted, several have the name, or the store cannot be read.
    """
    if re.fullmatch(r"[0-9a-f]{32}", run):
        found = _by_id(uri, run, experiment)
        if found is not None:
            return found
    quote = '"' if "'" in run else "'"
    if quote in run:  # MLflow's filters have no escapes
        raise ConfigError(f"run {run!r}: a name with both kinds of quotes cannot be searched for; give its MLflow id")
    named = find_runs(uri, experiment=experiment, filter=f"attributes.run_name = {quote}{run}{quote}")
    where = redact(uri) + (f", experiment {experiment!r}" if experiment else "")
    if not named:
        newest = ", ".join(known.name for known in find_runs(uri, experiment=experiment, limit=5)) or "none"
        raise ConfigError(f"run {run!r}: no such run in {where}; the newest there are: {newest}")
    if len(named) > 1:
        several = ", ".join(f"{same.id} ({same.experiment}, {same.start:%Y-%m-%d %H:%M})" for same in named[:5])
        raise ConfigError(f"run {run!r}: {len(named)} runs in {where} have this name; give an MLflow id: {several}")
    return named[0]


def find_runs(uri: str, *, experiment: str | None = None, filter: str = "", limit: int | None = None) -> list[RunData]:
    """Runs that are not deleted, the newest first.

    Args:
        uri: of the store, from `resolve_tracking_uri`.
        experiment: name of the one to look in; None: all.
        filter: in MLflow's syntax, such as `tags.gate = 'head' and metrics."val/loss" < 3`.
        limit: at most so many; None: all.

    Raises:
        ConfigError: the experiment does not exist, MLflow does not take the filter, or the store cannot be read.
    """
    store = _open(uri)
    with _answering(uri):
        known = {entry.experiment_id: entry.name for entry in _pages(store.client.search_experiments)}
    ids = [number for number, name in known.items() if experiment in (None, name)]
    if not ids and experiment is not None:
        names = ", ".join(sorted(known.values()))
        raise ConfigError(f"experiment {experiment!r}: not in {redact(uri)}; there are: {names or 'none'}")
    found: list[RunData] = []

    def search(**page: Any) -> Any:
        return store.client.search_runs(ids, filter, order_by=["attributes.start_time DESC"], **page)

    with _answering(uri, filter):
        for run in _pages(search) if ids else ():
            found.append(RunData(store, run, known[run.info.experiment_id]))
            if len(found) == limit:
                break
    return found


def _by_id(uri: str, run_id: str, experiment: str | None) -> RunData | None:
    from mlflow.exceptions import MlflowException

    store = _open(uri)
    with _answering(uri):
        try:
            run = store.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        name = store.client.get_experiment(run.info.experiment_id).name
    if run.info.lifecycle_stage != "active":
        raise ConfigError(f"run {run_id}: deleted in {redact(uri)}; restore it there")
    if experiment not in (None, name):
        raise ConfigError(f"run {run_id}: in experiment {name!r}, not in {experiment!r}")
    return RunData(store, run, name)


def _open(uri: str) -> _Store:
    """A client of a store that exists and has this MLflow's tables: MLflow itself would make or migrate them."""
    database = database_file(uri)
    if database and not database.is_file():
        raise ConfigError(f"{redact(uri)}: no such store; nothing has been recorded there")
    with _answering(uri):
        if is_database(uri) and schema_of(uri) is None:
            raise ConfigError(f"{redact(uri)}: a database, but not of MLflow")
        return _Store(uri, connect(uri))


@contextmanager
def _answering(uri: str, filter: str = "") -> Iterator[None]:
    """Turns what a store raises into one line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # MLflow lets errors of requests, SQLAlchemy and the file system through
        if filter and getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
            raise ConfigError(f"filter {filter!r}: {one_line(error)}") from error
        raise ConfigError(f"{redact(uri)}: the store cannot be read ({one_line(error)})") from error


def _pages(search: Callable[..., Any]) -> Iterable[Any]:
    token = None
    while True:
        page = search(max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _restored(value: float) -> float:
    return float(np.copysign(np.inf, value)) if abs(value) == _LARGEST else value


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
