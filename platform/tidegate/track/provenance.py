"""What a run was made of: commit, command, package versions. Never the host, the user or a secret."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata

from tidegate.redact import redact_command

VERSIONED_PACKAGES = ("tidegate", "torch", "ray", "deepspeed", "triton", "mlflow", "datasets")

_TAG_VALUE_LIMIT = 8000  # MLflow refuses longer ones


def provenance_tags(job: str, command: Sequence[str]) -> dict[str, str]:
    """The tags that say how to repeat a run: `tidegate.job`, `.command`, `.commit`, `.version.*`."""
    tags = {"tidegate.job": job, "tidegate.command": shlex.join(redact_command(command))}
    tags |= {f"tidegate.version.{name}": version for name, version in versions().items()}
    commit = git_commit()
    if commit is not None:
        tags["tidegate.commit"] = commit
        tags["mlflow.source.git.commit"] = commit.removesuffix("+dirty")  # the one the MLflow UI shows
    return {key: value[:_TAG_VALUE_LIMIT] for key, value in tags.items()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run stands on, as far as they are installed."""
    found = {package: _version(package) for package in VERSIONED_PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def git_commit() -> str | None:
    """The commit of the working directory, `+dirty` appended when files differ from it; None outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+dirty" if _git("status", "--porcelain") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
