"""What a node of a cluster is like: its versions, room and GPUs, and what it can reach. Runs on that node."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

import tidegate
import tidegate_kernels
from tidegate.config import ConfigError
from tidegate.track import check_tracking
from tidegate.train.nvml import Gpu, GpuState, gpus
from tidegate.train.storage import Storage

__all__ = ["ASKED", "CODE", "PYTHON", "NodeReport", "Wanted", "report", "versions"]

ASKED = "asked"
"""The file that the machine that asks writes; nodes write one with their id beside it."""
CODE, PYTHON = "tidegate's code", "python"
"""In `versions`, beside packages."""
_PACKAGES = ("ray", "torch", "deepspeed", "mlflow")


class Wanted(NamedTuple):
    """What every node must reach."""

    folders: tuple[str, ...]
    """Folders and URIs, with a folder `mark` in each."""
    mark: str
    """Also what the file `ASKED` in there says."""
    tracking: str
    """URI of MLflow."""


class NodeReport(NamedTuple):
    versions: dict[str, str]
    folders: dict[str, str]
    """What is wrong with each; empty if nothing is."""
    tracking: str
    """`check_tracking`'s line."""
    disk_bytes: int
    """Free, where there is least: temporary files (Ray's are there) or a local folder of `Wanted`."""
    memory_bytes: int
    """Available."""
    gpus: list[GpuState]
    auth: str | None
    """RAY_AUTH_MODE."""


def report(wanted: Wanted, me: str) -> NodeReport:
    """Look at this node; `me` is its id."""
    places = [tempfile.gettempdir(), *(folder for folder in wanted.folders if Path(folder).is_dir())]
    return NodeReport(
        versions(),
        {folder: _trouble(folder, wanted.mark, me) for folder in wanted.folders},
        check_tracking(wanted.tracking),
        min(shutil.disk_usage(place).free for place in places),
        psutil.virtual_memory().available,
        [gpu.state() for gpu in _gpus()],
        os.environ.get("RAY_AUTH_MODE"),
    )


def versions() -> dict[str, str]:
    """Of Python, the packages that are installed of those that must be the same, and a hash of Tidegate's own code."""
    found = {PYTHON: platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    code = hashlib.sha256()
    for module in (tidegate, tidegate_kernels):
        folder = Path(str(module.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found | {CODE: code.hexdigest()[:12]}


def _trouble(folder: str, mark: str, me: str) -> str:
    """Why a folder is not one that this node shares and can write to."""
    try:
        storage = Storage(folder)
        if storage.read(f"{mark}/{ASKED}") != mark.encode():
            return "reads something else than was written"
        storage.replace(f"{mark}/{me}", me.encode())
    except FileNotFoundError:
        return "is not the folder that the other machines see"
    except ConfigError as error:
        return str(error)
    return ""


def _gpus() -> list[Gpu]:
    try:
        return gpus()
    except (OSError, RuntimeError):  # no driver, or one that does not answer: torch would say no more
        return []
