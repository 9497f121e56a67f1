"""`tidegate checkpoints` and `tidegate verify`: what there is to resume from, and whether it is what was written."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from tidegate.config import ConfigError
from tidegate.launch.state import StateDir
from tidegate.redact import redact
from tidegate.train.checkpoint_store import MANIFEST, CheckpointStore, is_checkpoint
from tidegate.train.export import damaged_files
from tidegate.train.storage import Storage

__all__ = ["list_checkpoints", "verify_checkpoints"]

_PAGE_WIDTH = 150


def list_checkpoints(run: str, state: StateDir) -> None:
    """Print a run's checkpoints, oldest first, and what is wrong with those that cannot be resumed from.

    Raises:
        ConfigError: there is no such run, or its storage does not answer.
    """
    location = state.run(run).read().checkpoints
    table = Table(Column("checkpoint", no_wrap=True))
    for name in ("step", "tokens", "MB"):
        table.add_column(name, justify="right")
    table.add_column("metrics", overflow="fold")
    table.add_column("state", overflow="fold")
    for entry in CheckpointStore(Storage(location)).entries():
        manifest = entry.manifest
        metrics = sorted(manifest.metrics.items()) if manifest else []
        table.add_row(
            entry.name,
            f"{entry.step:,}",
            f"{manifest.tokens:,}" if manifest else "",
            f"{manifest.size / 1e6:,.1f}" if manifest else "",
            " ".join(f"{name}={value:.4g}" for name, value in metrics if name.count("/") == 1),
            entry.problem or "valid",
        )
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH
    console.print(redact(location), soft_wrap=True)
    console.print(table)


def verify_checkpoints(location: str) -> bool:
    """Read a checkpoint, all of a run, or an export again and print what is not as it was written, a line a file.

    Args:
        location: folder or URI.

    Returns:
        Whether all is.

    Raises:
        ConfigError: nothing there is a checkpoint, or the storage does not answer.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    parent, _, name = location.rstrip("/").rpartition("/")
    if Path(location, MANIFEST).is_file() and not is_checkpoint(name):
        return _print_damage(console, name, damaged_files(Path(location)))
    if is_checkpoint(name):
        store, names = CheckpointStore(Storage(parent or ".")), [name]
        if not store.storage.sizes(name):
            raise ConfigError(f"{location}: there is no such checkpoint")
    else:
        store = CheckpointStore(Storage(location))
        names = store.names()
        if not names:
            raise ConfigError(
                f"{location}: neither an export nor a checkpoint (called step_<number>-<attempt>) nor a folder of some"
            )
    whole = [_print_damage(console, name, store.damage(name)) for name in names]
    return all(whole)


def _print_damage(console: Console, name: str, problems: list[str]) -> bool:
    """Print a line, and one a problem; returns whether there was none."""
    console.print(f"{name}: {'damaged' if problems else 'every file is what was written'}")
    for problem in problems:
        console.print(f"  {problem}")
    return not problems
