"""The image: what it copies is there, what it installs is pinned, and nobody is root in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "Dockerfile"


def instructions():
    """Keyword and rest of each instruction, continuation lines joined and comments left out."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def of(keyword):
    return [rest for name, rest in instructions() if name == keyword]


def test_every_source_is_there_and_let_in():
    sources = [word for rest in of("COPY") for word in shlex.split(rest)[:-1] if not word.startswith("--")]
    assert sources
    let_in = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert "**" in let_in
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in let_in, source
    assert {line[1:] for line in let_in if line.startswith("!")} == set(sources), "nothing else is sent"


def test_the_last_user_is_not_root():
    users = of("USER")
    assert users
    assert users[-1] not in ("root", "0")
    assert f"--uid 1000 --shell /bin/bash {users[-1]}" in FILE.read_text(), "the id that volumes belong to"
    home = re.search(r"--home-dir (\S+)", FILE.read_text())[1]
    assert any(f"HOME={home}" in rest.split() for rest in of("ENV")), "else Ray mounts the token in /root"


def test_every_package_is_as_constraints_pin_it():
    commands = [part.strip() for rest in of("RUN") for part in rest.split("&&")]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    assert all("-c constraints.txt" in command for command in installs), installs
    assert not any(re.search(r"==|>=|\brayproject\b", command) for command in installs), "a version of its own"
    packages = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", packages, re.M)


def test_what_compiles_at_run_time_is_there():
    (base,) = of("FROM")
    assert "-devel-" in base  # nvcc
    installed = " ".join(of("RUN")).split()
    assert {"g++", "python3-dev", "ninja-build"} <= set(installed)


def test_no_secret_is_built_in():
    text = FILE.read_text()
    assert not re.search(r"(?i)(token|password|secret|key)\s*=", text)
    assert not of("ADD"), "COPY does not fetch or unpack"
