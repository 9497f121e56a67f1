"""A wheel has all that the commands read beside their code."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tidegate.cluster import load_cluster, render

rendering = importlib.import_module("tidegate.cluster.render")  # `render` there is its function

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("platform", "kernels", "cluster"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "wheel")
    return folder / "wheel"


def test_every_file_that_is_no_code_is_there(unpacked: Path) -> None:
    for top, package in (("platform", "tidegate"), ("kernels", "tidegate_kernels")):
        ours = {
            path.relative_to(ROOT / top)
            for path in (ROOT / top / package).rglob("*")
            if path.is_file() and path.suffix not in (".md", ".pyc")
        }
        there = {path.relative_to(unpacked) for path in (unpacked / package).rglob("*") if path.is_file()}
        assert ours == there


def test_clusters_render_from_what_it_installs(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data,) = unpacked.glob("*.data/data")
    monkeypatch.setattr(rendering, "_REPOSITORY", tmp_path)
    monkeypatch.setattr(rendering, "_INSTALLED", data / "share" / "tidegate" / "cluster")
    monkeypatch.chdir(tmp_path)
    ours = {path.stem for path in (ROOT / "cluster").glob("*.yaml")}
    assert set(rendering.cluster_files()) == ours
    assert "p5" in render(load_cluster("aws-spot-h100"), tmp_path)
