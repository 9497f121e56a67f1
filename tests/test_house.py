"""Rules of the repository that no linter checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("platform", "kernels")
LONGEST_FILE = 600  # lines; 400 is the aim
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").glob("*.yaml"))


def repository_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=30).stdout.decode()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a git checkout: {error}")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_source_roots_are_not_packages(root):
    assert (ROOT / root).is_dir()
    assert not (ROOT / root / "__init__.py").exists(), (
        f"{root}/__init__.py would shadow a module; source roots are no packages"
    )


@pytest.mark.parametrize("entry", [".", "platform"])
def test_platform_is_the_standard_librarys(entry):
    """With a platform/__init__.py here, Ray's workers import it in place of the real one and never register."""
    code = "import platform, sys; print(platform.__file__, platform.python_version())"
    environment = os.environ | {"PYTHONPATH": str(ROOT / entry)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert not Path(file).is_relative_to(ROOT), file
    assert version == ".".join(map(str, sys.version_info[:3]))


def test_python_files_fit_in_a_head():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for root in SOURCE_ROOTS
        for path in (ROOT / root).rglob("*.py")
    }
    assert lengths, "no Python files found: the source roots moved"
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_every_package_folder_has_an_init():
    package = ROOT / "platform" / "tidegate"
    folders = {path.parent for path in package.rglob("*.py")}
    parents = {parent for folder in folders for parent in folder.parents if parent.is_relative_to(package)}
    missing = [folder for folder in folders | parents if not (folder / "__init__.py").exists()]
    assert sorted(folder.relative_to(ROOT).as_posix() for folder in missing) == []


def test_no_machine_paths():
    """A path into someone's home or work directory works on one machine only."""
    # Written in parts, so that this file does not match itself. Placeholders such as /home/<user> pass.
    private = re.compile(r"(?<![\w.~$}/-])/(?:" + "|".join(["home", "Users", "root", "work"]) + r")/[A-Za-z0-9_.]")
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if private.search(line)
        ]
    assert found == []


def test_there_are_jobs():
    assert JOBS, "jobs/ holds no YAML"


@pytest.mark.parametrize("name", JOBS)
def test_every_job_loads(name):
    from tidegate.config import load
    from tidegate.train.job import Job

    assert isinstance(load(ROOT / name, Job).config, Job)
