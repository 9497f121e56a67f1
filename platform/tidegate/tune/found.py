"""The best of a sweep as a job file that extends the one that was varied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tidegate.config import in_folder, load
from tidegate.train.job import Job

__all__ = ["write_found"]


def write_found(file: Path, job_file: Path, job: Job, says: str) -> None:
    """Write a job as its difference from the file that it came from: `extends:`, relative, and what changed.

    Args:
        file: to write; its folder is made.
        job_file: that was varied.
        job: resolved.
        says: a line for the top of the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(job_file.resolve(), file.parent.resolve())
    before = load(job_file, Job).config.model_dump(mode="json")
    changes = in_folder(_changes(before, job.model_dump(mode="json")), job_file.parent, file.parent)
    text = yaml.safe_dump({"extends": base, **changes}, sort_keys=False, width=100)
    file.write_text(f"# {says}\n{text}", encoding="utf-8")


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What to lay over a resolved job to get another; a mapping of another kind is there whole."""
    changed = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") == old.get("kind"):
            below = _changes(old, value)
            if below:
                changed[key] = below
        elif key not in before or old != value:
            changed[key] = value
    return changed
