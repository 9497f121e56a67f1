"""Tidegate: a gated-MoE pretraining lab on Ray.

In a notebook, `tidegate.runs(...)` gives runs of a tracking store with `history()`, a data frame, and `load_model()`;
`tidegate.compare(runs).figure()` shows itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.launch.notebook import StoredRun

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "runs"]


def runs(*names: str, **where: Any) -> list[StoredRun]:
    """See `tidegate.launch.notebook.runs`."""
    from tidegate.launch import notebook

    return notebook.runs(*names, **where)


def compare(found: list[StoredRun], **how: Any) -> Any:
    """See `tidegate.launch.comparison.Comparison`; `figure()` draws it."""
    from tidegate.launch import notebook

    return notebook.compare(found, **how)
