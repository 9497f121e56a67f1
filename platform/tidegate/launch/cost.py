"""What a run costs while it trains: who counts, where it is kept, and when it is enough.

Whoever holds the workers has a `Meter`. The driver has the `Ledger`, a file beside the run's checkpoints, so that it
goes where the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tidegate.config import ConfigError, load_stored
from tidegate.quantities import cost_shown
from tidegate.train.job import Job
from tidegate.train.limits import Spent
from tidegate.train.storage import Storage, StorageError
from tidegate.train.telemetry import Record

__all__ = ["Ledger", "Meter", "spent_by"]

WRITE_S = 10.0
"""Between two writings of the ledger: what a driver that is killed forgets."""
_FILE = "cost.json"


class Meter:
    """Adds up the time of workers.

    Args:
        spent: before.
        price: of a worker and hour, with its GPU; None: unknown.
        share: of a GPU that a worker takes.
        clock: in seconds.
    """

    def __init__(
        self, spent: Spent, price: float | None, share: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._spent, self._price, self._share, self._clock = spent, price, share, clock
        self._workers, self._since = 0, clock()

    def set_workers(self, number: int) -> None:
        """So many are there from now on."""
        self._spent, self._workers, self._since = self.read(), number, self._clock()

    def read(self) -> Spent:
        """Up to now."""
        hours = (self._clock() - self._since) / 3600 if self._workers else 0.0
        gpu_hours = hours * self._workers * self._share
        money = self._spent.money
        if self._price is not None:
            money = (money or 0.0) + gpu_hours * self._price
        return Spent(hours=self._spent.hours + hours, gpu_hours=self._spent.gpu_hours + gpu_hours, money=money)

    def mark(self, record: Record) -> Record:
        """The record with what the run has cost up to it."""
        return record._replace(metrics={**record.metrics, **self.read().metrics()})


def spent_by(checkpoints: str) -> Spent:
    """What the run with these checkpoints, a folder or URI, has cost; nothing where no ledger is.

    Raises:
        ConfigError: the file is damaged.
    """
    storage = Storage(checkpoints)
    try:
        document = storage.read(_FILE).decode()
    except FileNotFoundError:
        return Spent()
    return load_stored(document, Spent, storage.path(_FILE))


class Ledger:
    """What a run has cost over all its starts.

    Args:
        checkpoints: folder or URI of the run's.
        job: its limits and its price.
        share: of a GPU that a worker takes.
        notice: is told once if it cannot be written.

    Raises:
        ConfigError: the file is damaged, or a limit is reached already.
    """

    def __init__(
        self, checkpoints: str, job: Job, share: float = 1.0, notice: Callable[[str], None] = lambda line: None
    ) -> None:
        self._storage, self._limits, self._notice = Storage(checkpoints), job.limits, notice
        self._resources, self._share = job.resources, share
        self.spent = spent_by(checkpoints)
        self._written_at = -WRITE_S
        self._writes = True
        self.limit = self._limits.reached(self.spent)
        """That is reached; empty if none is."""
        if self.limit:
            raise ConfigError(
                f"{self.limit} is reached: the run has cost {self.in_words()} so far; raise it with "
                f"--set {self.limit.partition('=')[0]}=..."
            )

    def meter(self) -> Meter:
        """To go on counting from here."""
        return Meter(self.spent, self._resources.price_per_hour, self._share)

    def take(self, spent: Spent) -> bool:
        """Keep what the run has cost by now; whether it should stop for that."""
        if spent.gpu_hours >= self.spent.gpu_hours:  # a board that died forgets what was lost since the driver began
            self.spent = spent
        self.limit = self.limit or self._limits.reached(self.spent)
        if time.monotonic() - self._written_at > WRITE_S:
            self.write()
        return bool(self.limit)

    def in_words(self) -> str:
        return cost_shown(self.spent.metrics(), self._resources.gpu)

    def write(self) -> None:
        """Write it to the storage; what goes wrong there is no reason for a run to end."""
        self._written_at = time.monotonic()
        try:
            self._storage.replace(_FILE, self.spent.model_dump_json().encode())
        except StorageError as error:
            if self._writes:
                self._notice(f"what the run costs is not kept for the next start: {error}")
            self._writes = False
