"""Job files: strict pydantic models, `extends:`, `--set a.b=c`, errors that name file, field and value.

A job file is YAML. `extends: base.yaml` names a file beside it that is read first, or several, each laid over the one
before; the job's own keys are laid over that, key by key. Two rules keep that simple: a list replaces a list, and a
mapping whose `kind` differs from the base's replaces it whole (the fields of another variant mean nothing).
`--set a.b=c` is the same overlay with one key. Whatever wins, the source of every value is remembered, so an error can
say where the value was written.

`{job}` in a value stands for the folder of the file that it is written in, and of `--set` for that of the job file. In
a loaded job it is always the latter: what a base in another folder wrote is changed to lead there.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tidegate.redact import is_secret_name, redact

__all__ = [
    "Config",
    "ConfigError",
    "JobFile",
    "LoadedJob",
    "Variant",
    "diff",
    "flatten",
    "in_folder",
    "load",
    "load_stored",
]


class ConfigError(ValueError):
    """A user's mistake. The message names the file, the field and the value; the CLI exits with status 2.

    Secrets in the message are hidden: values and addresses come from wherever the user keeps them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class Config(BaseModel):
    """Base of every section of a job: frozen, no unknown keys, choices only (derived values are properties)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    moved: ClassVar[dict[str, str]] = {}
    """Fields that are elsewhere now: the old name here to the whole new one."""


class Variant(Config):
    """A kind that a user can choose, as `tidegate list` shows it."""

    summary: ClassVar[str]
    """One line."""
    source: ClassVar[str]
    """The paper."""
    example: ClassVar[str] = ""
    """YAML of the fields that it cannot do without."""


C = TypeVar("C", bound=Config)


class LoadedJob(NamedTuple):
    """A resolved job and where it came from."""

    config: Any
    """The validated config."""
    overrides: dict[str, Any]
    """Flat `path -> value` of all that the later files and `--set` changed against the outermost base. A file without
    `extends:` is its own base, so only `--set` shows. What another `kind` threw out maps to None."""
    base: str | None
    """Name of the file that the job's own lies directly over; None without `extends:`."""


def load(path: str | Path, schema: type[C], overrides: Sequence[str] = (), *, below: Path | None = None) -> LoadedJob:
    """Read a job file, lay it over what it extends, apply `--set` overrides and validate.

    Args:
        path: the YAML file.
        schema: the config class of the whole job.
        overrides: `a.b=c` strings; the value is read as YAML.
        below: a file that this one is laid over whatever it extends.

    Raises:
        ConfigError: with every problem found, one a line, each naming file, field and value.
    """
    return JobFile(path, overrides, below=below).load(schema)


class JobFile:
    """A job file, what it extends and overrides, read once for many a `load`.

    Args:
        path: the YAML file.
        overrides: `a.b=c` strings; the value is read as YAML.
        below: a file that this one is laid over whatever it extends.

    Raises:
        ConfigError: a file or an override cannot be read.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = (), *, below: Path | None = None) -> None:
        self._path, self._sources = str(path), dict[str, str]()
        folder = Path(path).parent
        files = [*(_extends_chain(below) if below else ()), *_extends_chain(Path(path))]
        chain = [(file, in_folder(mapping, file.parent, folder)) for file, mapping in files]
        self.paths = [file for file, _ in chain]
        """Of all that was read, the job's own last."""
        (file, self._base), *others = chain
        self._parent = chain[-2][0].name if others else None
        self._merged = _overlay({}, self._base, str(file), self._sources)
        for file, mapping in others:
            self._merged = _overlay(self._merged, mapping, str(file), self._sources)
        for override in overrides:
            self._merged = _overlay(self._merged, _parse_override(override), f"--set {override}", self._sources)

    def load(self, schema: type[C], values: Mapping[str, Any] | None = None) -> LoadedJob:
        """The job with these values, by path, laid over it as overrides are.

        Raises:
            ConfigError: with every problem found, one a line, each naming file, field and value.
        """
        sources, merged = dict(self._sources), self._merged
        for path, value in (values or {}).items():
            merged = _overlay(merged, _at(path, value), f"--set {path}={json.dumps(value)}", sources)
        return LoadedJob(_validate(merged, schema, self._path, sources), diff(self._base, merged), self._parent)


def load_stored(document: str, schema: type[C], source: str) -> C:
    """Validate a resolved config that a run stored as JSON."""
    try:
        mapping = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not JSON ({error})") from error
    return _validate(mapping, schema, source, {})


def flatten(value: Mapping[str, Any] | Config, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [{"d": 2}]}` becomes `{"a.b": 1, "c.0.d": 2}`."""
    mapping = value.model_dump(mode="json") if isinstance(value, Config) else value
    return dict(_leaves(mapping, prefix))


def diff(before: Mapping[str, Any] | Config, after: Mapping[str, Any] | Config) -> dict[str, Any]:
    """Flat `path -> new value` of every leaf that differs; a leaf that went away maps to None."""
    old, new = (flatten(side) if side else {} for side in (before, after))
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    gone = {key: None for key in old if key not in new}
    return changed | gone


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, value


# --- reading -------------------------------------------------------------------------------------------------


_MERGE = "tag:yaml.org,2002:merge"
_MOST_VALUES = 100_000  # of a file, aliases written out; the longest job here has some 200

_UNREADABLE = (
    yaml.YAMLError,
    RecursionError,  # of 5,000 brackets
    ValueError,  # and the rest: PyYAML's answers to 2024-13-45, !!bool x, !!int '' and !!timestamp x
    TypeError,
    LookupError,
    AttributeError,
)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key instead of keeping the last one, and reads 3e-4 as a float.

    It also refuses a file whose aliases stand for more than anyone writes, or for themselves.
    """

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases written out it holds more than {_MOST_VALUES:,} values")
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue  # `<<` may stand twice; a key that is a list or a mapping is refused by SafeLoader
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node, aliases written out; infinite for one that holds itself. `known` has what was counted."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        known[id(node)] = 1 + sum(_num_values(child, known) for child in below)
    return known[id(node)]


_StrictLoader.add_implicit_resolver(  # YAML 1.1 wants a dot in 1.0e-3; people write 1e-3
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _extends_chain(path: Path, below: Sequence[tuple[Path, Path]] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The files from the outermost base to `path`, each with its own mapping.

    Args:
        path: the file to begin with.
        below: those that lead to it, as they were named and resolved.
    """
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a link to itself
        first = below[0][0] if below else path
        raise ConfigError(f"{first}: extends: {str(path)!r} is no file ({error})") from error
    circle = [*(str(other) for _, other in below), str(resolved)]
    if str(resolved) in circle[:-1]:
        raise ConfigError(f"{below[0][0]}: extends: goes in a circle ({' -> '.join(circle)})")
    mapping = _read_yaml(path, named_by=below[-1][0] if below else None)
    parents = mapping.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends: needs a file name or a list of them, got {parents!r}")
    deeper = [*below, (path, resolved)]
    return [entry for parent in parents for entry in _extends_chain(path.parent / parent, deeper)] + [(path, mapping)]


def in_folder(value: Any, written_in: Path, folder: Path) -> Any:
    """A value with `{job}` of a file in one folder as it is written in another, to the same effect."""
    if isinstance(value, dict):
        return {key: in_folder(part, written_in, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [in_folder(part, written_in, folder) for part in value]
    if isinstance(value, str) and "{job}" in value:
        way = Path(os.path.relpath(written_in.resolve(), folder.resolve())).as_posix()
        return value if way == "." else value.replace("{job}", f"{{job}}/{way}")
    return value


def _read_yaml(path: Path, named_by: Path | None) -> dict[str, Any]:
    where = f"{named_by}: extends: " if named_by else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{where}no such job file: {path}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}cannot read {path}: {error}") from error
    try:
        mapping = yaml.load(text, Loader=_StrictLoader)
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: a job file is a mapping, got {type(mapping).__name__}")
    return mapping


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {override}: write it as a.b=value")
    try:
        value: Any = yaml.load(text, Loader=_StrictLoader)
    except _UNREADABLE as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    return _at(path, value)


def _at(path: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a.b`."""
    *sections, field = path.split(".")
    mapping = {field: value}
    for key in reversed(sections):
        mapping = {key: mapping}
    return mapping


def _overlay(base: Any, over: Any, source: str, sources: dict[str, str], path: str = "") -> Any:
    """`over` on top of `base`; neither is changed. Lists may be addressed by index from `--set`."""
    if isinstance(base, list) and isinstance(over, dict) and source.startswith("--set"):
        merged = list(base)
        for key, value in over.items():
            if not str(key).isdecimal() or int(key) >= len(base):
                raise ConfigError(f"{source}: {path} is a list of {len(base)} items; {key!r} is not one of them")
            merged[int(key)] = _overlay(base[int(key)], value, source, sources, f"{path}.{key}")
        return merged
    mappings = isinstance(base, dict) and isinstance(over, dict)
    if not mappings or ("kind" in base and over.get("kind", base["kind"]) != base["kind"]):
        for stale in [key for key in sources if key.startswith(f"{path}.")]:
            del sources[stale]
        sources[path] = source
        base = {}
    if not isinstance(over, dict):
        return over
    merged_mapping = dict(base)
    for key, value in over.items():
        child = f"{path}.{key}" if path else str(key)
        merged_mapping[key] = _overlay(base.get(key), value, source, sources, child)
    return merged_mapping


# --- validating ----------------------------------------------------------------------------------------------


def _validate(mapping: Any, schema: type[C], path: str, sources: Mapping[str, str]) -> C:
    secrets = [
        f"{sources.get(name, path)}: {name}: holds a secret, and a job is recorded where many can read it; leave it to "
        "the environment (docs/security.md)"
        for name in _secrets(mapping)
    ]
    if secrets:
        raise ConfigError("\n".join(secrets))
    try:
        return schema.model_validate(mapping)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        below = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
        lines = [
            _describe(problem, schema, path, sources)
            for problem in problems
            if problem["type"] != "too_short" or problem["loc"] not in below  # pydantic leaves wrong items uncounted
        ]
        raise ConfigError("\n".join(lines)) from error


def _secrets(value: Any, name: str = "") -> Iterator[str]:
    """Names of the values that must not be recorded."""
    if isinstance(value, str):
        if redact(value) != value:
            yield name
    elif isinstance(value, Mapping):
        for key, item in value.items():
            child = f"{name}.{key}" if name else str(key)
            if is_secret_name(key) and item is not None:
                yield child
            else:
                yield from _secrets(item, child)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _secrets(item, f"{name}.{index}")


def _describe(problem: Any, schema: type[Config], path: str, sources: Mapping[str, str]) -> str:
    keys, parent, kinds = _resolve_location(problem["loc"], schema)
    value = problem.get("input")
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = f" (got {'a mapping' if isinstance(value, dict) else repr(value)})"
    where = f"{_written_in(keys, problem, sources) or path}: {'.'.join(keys)}".removesuffix(" ")
    match problem["type"]:
        case "missing":
            return f"{where}: {message}"
        case "value_error" | "assertion_error":  # of several fields, which the message names with their values
            mine = "" if isinstance(value, (dict, Config)) else shown
            return f"{where}: {message}{mine}" if keys else f"{where} {message}{mine}"
        case "extra_forbidden":
            if parent and keys[-1] in parent.moved:
                return f"{where}: is called {parent.moved[keys[-1]]} now{shown}"
            known = list(parent.model_fields) if parent else []
            near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            return f"{where}: unknown field{shown}; {hint}"
        case "union_tag_not_found":
            return f"{where}: needs `kind`, one of {', '.join(map(repr, kinds))}"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            near = difflib.get_close_matches(str(tag), map(str, kinds), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{where}: unknown kind {tag!r}, one of {', '.join(map(repr, kinds))}{hint}"
        case _:
            return f"{where}: {message}{shown}"


def _written_in(keys: list[str], problem: Any, sources: Mapping[str, str]) -> str | None:
    """Where the value was written: the sources of all fields that a cross-field message names, or of the field."""
    if problem["type"] == "value_error":
        named = (".".join([*keys, name]) for name in re.findall(r"([a-z][a-z0-9_.]*)=", problem["msg"]))
        written = dict.fromkeys(sources[name] for name in named if name in sources)
        if written:
            return ", ".join(written)
    if problem["type"] == "union_tag_invalid":
        keys = [*keys, "kind"]
    paths = (".".join(keys[:depth]) for depth in range(len(keys), 0, -1))
    return next((sources[path] for path in paths if path in sources), None)


class _Place(NamedTuple):
    """What pydantic's location means in the file."""

    keys: list[str]
    owner: type[Config] | None
    """The class that has, or should have, the last key."""
    kinds: list[Any]
    """The `kind`s that may stand there."""


def _resolve_location(location: tuple[int | str, ...], schema: type[Config]) -> _Place:
    """Turn pydantic's location, which holds union tags, into the keys of the file."""
    keys: list[str] = []
    owner: type[Config] | None = None
    current: Any = schema
    for part in location:
        options = _options(current)
        tagged = [o for o in options if _is_config(o) and part in _kinds(o)]
        if len(options) > 1 and tagged:
            current = tagged[0]
            continue
        keys.append(str(part))
        models = [option for option in options if _is_config(option)]
        owner = models[0] if models else None
        current = None
        for option in options:
            if _is_config(option) and part in option.model_fields:
                owner, current = option, option.model_fields[str(part)].annotation
            elif get_origin(option) in (list, tuple) and isinstance(part, int):
                current = get_args(option)[0]
            elif get_origin(option) is dict:
                current = get_args(option)[1]
    return _Place(keys, owner, [kind for option in _options(current) if _is_config(option) for kind in _kinds(option)])


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _is_config(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Config)


def _kinds(option: type[Config]) -> tuple[Any, ...]:
    kind = option.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()
