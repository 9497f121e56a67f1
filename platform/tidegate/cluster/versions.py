"""The one place that says which Ray a cluster runs: the one that is installed here, as constraints.txt pins it."""

from __future__ import annotations

from importlib import metadata

__all__ = ["ray_version"]


def ray_version() -> str:
    """Ray's, which must be the same to the last digit wherever a job is submitted from and runs."""
    return metadata.version("ray")
