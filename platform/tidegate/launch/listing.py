"""`tidegate list`: what a job can choose from."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from tidegate.config import ConfigError
from tidegate.model.catalogue import SUBJECTS, choices

__all__ = ["list_choices"]

_PAGE_WIDTH = 150


def list_choices(subject: str) -> None:
    """Print the routers, gates or balance methods, a row each with its line of YAML and its paper.

    Raises:
        ConfigError: there is no such subject.
    """
    known = next((name for name in SUBJECTS if name == subject), None)
    if known is None:
        raise ConfigError(f"list {subject}: unknown, one of {', '.join(SUBJECTS)}")
    table = Table(
        Column("name", no_wrap=True), Column("in a job", overflow="fold"), Column("what it does"), Column("source")
    )
    for choice in choices(known):
        table.add_row(choice.name, choice.yaml, choice.summary, choice.source)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH
    console.print(table)
