"""Runs in Python, for notebooks: `tidegate.runs(...)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.config import ConfigError
from tidegate.launch.compare import wanted_runs
from tidegate.launch.comparison import Comparison
from tidegate.launch.export import open_checkpoint
from tidegate.launch.state import StateDir, default_state_dir
from tidegate.track import RunData

if TYPE_CHECKING:
    import pandas as pd

    from tidegate.model.decoder import Decoder

__all__ = ["StoredRun", "compare", "runs"]


class StoredRun:
    """A run of a tracking store, and its checkpoints if this machine has them.

    Args:
        data: of the store; its attributes (`name`, `params`, `tags`, `metrics`, `status`, ...) are this one's too.
        state: where checkpoints are looked for.
    """

    def __init__(self, data: RunData, state: StateDir) -> None:
        self.data, self._state = data, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __repr__(self) -> str:
        return repr(self.data)

    def history(self) -> pd.DataFrame:
        """As `RunData.history`: a row a step, `tokens`, then a column a metric."""
        return self.data.history()

    def load_model(self, checkpoint: str | None = None, device: str = "cpu") -> Decoder:
        """The trained model in fp32, ready to be called, whole from any layout.

        Args:
            checkpoint: as `tidegate checkpoints` names them; None is the newest that is whole.
            device: where it goes.

        Raises:
            ConfigError: this machine's state directory has no such run or checkpoint, or another run of the name.
        """
        here = self._state.run(self.data.name).read().run_id
        if here != self.data.id:
            raise ConfigError(
                f"run {self.data.name}: {self._state.root} has another run of this name (MLflow id {here}, not "
                f"{self.data.id}); give the state directory of its machine with state_dir="
            )
        return open_checkpoint(self.data.name, self._state, checkpoint).load(device)


def runs(
    *names: str,
    experiment: str | None = None,
    filter: str = "",
    store: str | None = None,
    state_dir: str | Path | None = None,
) -> list[StoredRun]:
    """Runs by name or MLflow id, and those of an experiment or that a filter finds.

    Args:
        names: of runs.
        experiment: all of its runs, or those of it that `filter` finds.
        filter: in MLflow's syntax, such as `tags.gate = 'none'`.
        store: URI of an MLflow store; None: as `tidegate train` would use.
        state_dir: None: $TIDEGATE_STATE or ./.tidegate.

    Raises:
        ConfigError: there is no such run, or the store cannot be read.
    """
    state = StateDir(Path(state_dir) if state_dir is not None else default_state_dir())
    return [StoredRun(data, state) for data in wanted_runs(names, state, store, experiment, filter)]


def compare(found: Sequence[StoredRun], *, force: bool = False, more: Sequence[str] = ()) -> Comparison:
    """The runs beside each other; see `Comparison`."""
    return Comparison([run.data for run in found], force=force, more=more)
