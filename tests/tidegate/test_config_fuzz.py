"""Job files and overrides that nobody wrote in good faith: a config or a ConfigError, soon, and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.config import ConfigError, flatten, load, load_stored
from tidegate.train.job import Job

fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # each example writes its file
)

PIECES = [
    *(
        "model: ",
        "data: ",
        "extends: ",
        "name: ",
        "kind: ",
        "? ",
        ": ",
        "- ",
        "  ",
        "\n",
        "\n",
        "\n  ",
        "{",
        "}",
        "[",
        "]",
    ),
    *(", ", "&a ", "*a", "<<: *a", "<<: [*a, *a]", "!!timestamp x", "!!int ''", "!!bool x", "!!float x", "!!binary x"),
    *("!!set ", "!!omap ", "!!pairs ", "!!python/name:os.system", "!!python/object/apply:os.system ['true']", "!x "),
    *(
        "1e400",
        ".nan",
        "-.inf",
        "0b",
        "0x_",
        "1:30",
        "190:20:30.15",
        "2024-13-45",
        "~",
        "''",
        '"\\ud800"',
        '"\\0"',
        "\t",
    ),
    *("|", ">", "%YAML 9.9", "---", "...", "#", "@", "`", "\ufeff", "\x85", "é", "9" * 5000, "../" * 40, "x" * 5000),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**6, 2**31, 2**63, 10**30, 10**400, -(10**400), "", "a", "1", "demo", "..", "\0", "\ud800"])
    | st.floats()
    | st.text(max_size=8)
)
KEYS = st.sampled_from(["kind", "num", "name", "top_k", "path"]) | st.text(max_size=4) | st.integers(-1, 1) | st.none()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def read(path: Path, overrides: tuple[str, ...] = ()) -> Any:
    """The job; None if it was refused."""
    try:
        return load(path, Job, overrides).config
    except ConfigError:
        return None


@fuzzed
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=60))
def test_any_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read(path) is None


@fuzzed
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    assert read(path) is None
    with pytest.raises(ConfigError):
        load_stored("[" * 100_000, Job, "job.json")
    with pytest.raises(ConfigError):
        load_stored(data.decode("latin-1"), Job, "job.json")


@fuzzed
@given(st.data())
def test_a_job_with_any_values_in_some_places(
    tiny_job: Callable[..., Path], tmp_path: Path, data: st.DataObject
) -> None:
    job = yaml.safe_load(tiny_job().read_text(encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 3))):
        here = job
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(here[key], dict | list) or not here[key] or data.draw(st.integers(0, 3)) == 0:
                break
            here = here[key]
        key = data.draw(KEYS) if isinstance(here, dict) and data.draw(st.booleans()) else key
        here[key] = data.draw(VALUES)
    path = tmp_path / "mutant.yaml"
    with contextlib.suppress(UnicodeEncodeError):
        path.write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        if (config := read(path)) is not None:
            assert Job.model_validate_json(config.model_dump_json()) == config


@fuzzed
@given(st.data())
def test_any_override(tiny_job: Callable[..., Path], data: st.DataObject) -> None:
    path = tiny_job()
    fields = sorted(flatten(yaml.safe_load(path.read_text(encoding="utf-8"))))
    value = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | SCALARS.map(str)
    pair = st.tuples(st.sampled_from(fields) | st.text(max_size=6), st.just("=") | st.just(""), value).map("".join)
    read(path, tuple(data.draw(st.lists(pair, min_size=1, max_size=3))))


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(350))]),
        "\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(3000))]),
        "[" * 5000,
        "{a: " * 5000,
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "\n".join(["a0: &a0 {x: 1}", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12))]),
        "\n".join(
            ["a0: &a0 {x: 1}", *(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}" for i in range(12))]
        ),
    ],
    ids=[
        "a ladder",
        "a high ladder",
        "lists",
        "mappings",
        "in itself",
        "merged into itself",
        "a billion laughs",
        "a billion merges",
    ],
)
def test_a_file_that_is_more_than_it_looks_like_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load(path, Job)
    assert time.monotonic() - started < 5


def test_an_extends_that_no_file_can_have(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name in ("a\\0b", "x" * 5000, "\\ud800", "loop", "."):
        path = tmp_path / "job.yaml"
        path.write_text(f'extends: "{name}"', encoding="utf-8")
        with pytest.raises(ConfigError):
            load(path, Job)
