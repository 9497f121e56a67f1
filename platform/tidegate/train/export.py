"""Folders of safetensors files: what `tidegate export` writes, and what `train.init_from` reads.

<folder>/
  manifest.json                 where the weights are from, the model; size and SHA-256 of every other file
  config.json                   --format hf: what transformers reads
  model.safetensors             or model-00001-of-00003.safetensors, ... and model.safetensors.index.json
  tokenizer.json, tokenizer_config.json

The tensors have the decoder's names, or with `--format hf` those of an architecture of Hugging Face transformers. A
folder exists from the moment that it is whole and was read back; it is filled under another name beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tidegate.config import Config, ConfigError
from tidegate.model.decoder import ModelConfig
from tidegate.model.huggingface import FromHuggingFace, ToHuggingFace, architecture_of, config_of, model_of
from tidegate.model.weights import ALL, Spec, Weights, misfits, num_parameters, specs_of
from tidegate.train.checkpoint_store import MANIFEST, Damaged, FileRecord, seal, stays_inside, unseal
from tidegate.train.storage import sync_folder

__all__ = [
    "SHARD_BYTES",
    "ExportManifest",
    "Format",
    "Origin",
    "SafetensorsFolder",
    "damaged_files",
    "open_export",
    "write_export",
]

Format = Literal["tidegate", "hf"]
SHARD_BYTES = 5_000_000_000
"""A file is not larger, unless one tensor is."""
_SINGLE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_CHUNK = 1 << 20


class Origin(Config):
    """Where exported weights are from."""

    run: str
    checkpoint: str
    step: int
    tokens: int


class ExportManifest(Config):
    """manifest.json."""

    tidegate: str
    """Version that wrote it."""
    format: Format
    architecture: str | None
    """Of Hugging Face transformers, with `format: hf`."""
    origin: Origin
    model: dict[str, Any]
    dtype: str
    parameters: int
    """Of the model: what is trained."""
    tensors: int
    """In the files."""
    files: dict[str, FileRecord]


class _Written(NamedTuple):
    """A folder's contents as they are to be: tensors, other files, and what they are called after."""

    weights: Weights
    files: Mapping[str, bytes]
    architecture: str | None


def write_export(
    out: Path,
    weights: Weights,
    model: ModelConfig,
    *,
    format: Format,
    origin: Origin,
    version: str,
    max_positions: int,
    end_of_text: int | None = None,
    extra: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportManifest:
    """Write a folder, read it back, compare every number with the source, and give it its name.

    Args:
        out: the folder; must not exist.
        weights: the model's, all of them.
        model: its config.
        format: names of the decoder, or of Hugging Face transformers.
        origin: for the manifest.
        version: Tidegate's.
        max_positions: for transformers' config.json.
        end_of_text: for transformers' config.json.
        extra: further files by name, such as the tokenizer.
        shard_bytes: a file is not larger, unless one tensor is.

    Raises:
        ConfigError: `out` exists or cannot be written, or no architecture fits the model.
    """
    dtype = str(weights.specs["embedding.weight"].dtype).removeprefix("torch.")
    written = _Written(weights, extra or {}, None)
    if format == "hf":
        architecture = architecture_of(model)
        config = json.dumps(config_of(model, dtype, max_positions, end_of_text), indent=2) + "\n"
        renamed = ToHuggingFace(weights, model, architecture)
        written = _Written(renamed, {**written.files, _CONFIG: config.encode()}, architecture.name)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out}: exists; name another folder or remove it")
    scratch = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        _write_files(scratch, written, shard_bytes)
        compare(_under_our_names(scratch, model, format), weights)
        manifest = ExportManifest(
            tidegate=version,
            format=format,
            architecture=written.architecture,
            origin=origin,
            model=model.model_dump(mode="json"),
            dtype=dtype,
            parameters=num_parameters(weights.specs),
            tensors=len(written.weights.specs),
            files={path.name: _record(path) for path in sorted(scratch.iterdir())},
        )
        _write(scratch / MANIFEST, seal(manifest.model_dump(mode="json")))
        sync_folder(scratch)
        scratch.rename(out)
        sync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out}: cannot be written ({error}); free space or name another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _write_files(folder: Path, written: _Written, shard_bytes: int) -> None:
    """One shard at a time is in memory."""
    specs = written.weights.specs
    shapes = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        save_file(
            {name: written.weights.read(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"}
        )
        with (folder / file).open("rb") as handle:
            os.fsync(handle.fileno())
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write(folder / _INDEX, json.dumps(index, indent=1).encode())
    for name, content in written.files.items():
        _write(folder / name, content)


def compare(found: Weights, wanted: Weights) -> None:
    """Fail unless both have the same tensors with the same numbers: nothing dropped, twice or in another's place.

    Norms alone may differ in their last bit, where an architecture stores them less 1.
    """
    problems = misfits(found.specs, wanted.specs)
    assert not problems, problems
    for name in wanted.specs:
        a, b = wanted.read(name), found.read(name)
        same = a.dtype == b.dtype and (torch.equal(a, b) or torch.equal(_bits(a), _bits(b)))
        if name.endswith("norm.weight"):
            same = torch.allclose(a.double(), b.double(), rtol=0, atol=2**-22, equal_nan=True)
        assert same, f"{name} has other values"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """For what is not a number, and equals nothing."""
    return tensor.contiguous().view(-1).view(torch.uint8)


class SafetensorsFolder(Weights):
    """The tensors of a folder's safetensors files, read where they are asked for.

    Raises:
        ConfigError: there are none, or they are not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = self._names()
        self._specs = {}
        for name, file in self._file_of.items():
            part = self._open(file).get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ConfigError(f"{folder / file}: {name} is of dtype {part.get_dtype()}, which no model here has")
            self._specs[name] = Spec(tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        file = self._open(self._file_of[name])
        tensor: torch.Tensor = file.get_tensor(name) if rows == ALL else file.get_slice(name)[rows]
        return tensor

    def _names(self) -> dict[str, str]:
        index = self.folder / _INDEX
        if not index.exists():
            if not (self.folder / _SINGLE).exists():
                raise ConfigError(f"{self.folder}: has neither {_SINGLE} nor {_INDEX}")
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ConfigError(f"{index}: weight_map is no mapping of tensors to files")
        for name, file in files.items():
            if not stays_inside(file):
                raise ConfigError(f"{index}: names {file!r}, which is not a file of the folder")
            if name not in self._open(file).keys():  # noqa: SIM118 - not a mapping
                raise ConfigError(f"{index}: {name} is not in {file}")
        return files

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self.folder / file}: cannot be read as safetensors ({error})") from error
        return self._files[file]


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_export(folder: Path) -> tuple[ModelConfig, Weights]:
    """The model that a folder holds, and its tensors under the decoder's names; contents are not read yet.

    Args:
        folder: written by `tidegate export`, or by transformers' `save_pretrained`.

    Raises:
        ConfigError: it is neither, or not whole.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    manifest = read_manifest(folder)
    if manifest is not None and manifest.format == "tidegate":
        try:
            model = ModelConfig.model_validate(manifest.model)
        except ValidationError as error:
            raise ConfigError(f"{folder / MANIFEST}: model: {' '.join(str(error).split())}") from error
        return model, _under_our_names(folder, model, "tidegate")
    if not (folder / _CONFIG).exists():
        raise ConfigError(f"{folder}: has neither {MANIFEST} nor {_CONFIG}: not an export, nor a model of transformers")
    _, model = model_of(read_json(folder / _CONFIG), str(folder / _CONFIG))
    return model, _under_our_names(folder, model, "hf")


def _under_our_names(folder: Path, model: ModelConfig, format: Format) -> Weights:
    held = SafetensorsFolder(folder)
    if format == "hf":
        return FromHuggingFace(held, model, architecture_of(model), str(folder))
    problems = misfits(held.specs, specs_of(model))
    if problems:
        raise ConfigError(f"{folder}: not the model of its {MANIFEST}: {'; '.join(problems)}")
    return held


def read_manifest(folder: Path) -> ExportManifest | None:
    """The folder's manifest, whole; None where there is none.

    Raises:
        ConfigError: it was changed.
    """
    path = folder / MANIFEST
    try:
        return ExportManifest.model_validate(unseal(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (Damaged, ValidationError) as error:
        raise ConfigError(f"{path}: is damaged: {' '.join(str(error).split())}") from error


def damaged_files(folder: Path) -> list[str]:
    """Read all that the folder's manifest lists again; a line a file that is not what was written.

    Without a manifest there is nothing to compare with.

    Raises:
        ConfigError: the manifest was changed.
    """
    manifest = read_manifest(folder)
    problems = []
    for name, record in manifest.files.items() if manifest else ():
        path = folder / name
        if not stays_inside(name) or not path.is_file():
            problems.append(f"{name}: is missing, but {MANIFEST} lists it")
        elif _record(path) != record:
            problems.append(f"{name}: its content is not what was written (SHA-256 differs)")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: it is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: is not a JSON object")
    return document


def _record(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
