"""`tidegate export`: a run's weights as one model in safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table

from tidegate import __version__
from tidegate.config import ConfigError, load_stored
from tidegate.data import TokenDataset, find
from tidegate.data.shards import TOKENIZER_FILE
from tidegate.data.tokenizer import END_OF_TEXT, PAD
from tidegate.launch.state import RunFolder, StateDir
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.moe import MoEConfig
from tidegate.model.weights import Weights, load_weights
from tidegate.parallel.consolidate import CheckpointWeights
from tidegate.train.checkpoint_store import CheckpointStore, Entry, Manifest
from tidegate.train.export import ExportManifest, Format, Origin, write_export
from tidegate.train.job import Job
from tidegate.train.storage import Storage

__all__ = ["Exported", "OpenCheckpoint", "chosen", "export_run", "open_checkpoint", "token_dataset"]

_FORMATS: dict[str, Format] = {"tidegate": "tidegate", "hf": "hf"}


def export_run(run: str, state: StateDir, format: str, checkpoint: str | None, out: Path | None) -> Exported:
    """Write a checkpoint's weights in use, all experts, to a new folder; check and print what is in it.

    Args:
        run: its name.
        state: where it is.
        format: `tidegate` or `hf`.
        checkpoint: name of one of its checkpoints; None is the newest that is whole.
        out: the folder; None is one named after run, step and format in the state directory.

    Raises:
        ConfigError: there is no such run, checkpoint or format; a file that is needed is missing or damaged; `out`
            exists; no architecture of transformers fits.
    """
    if format not in _FORMATS:
        raise ConfigError(f"--format {format}: unknown, one of {', '.join(_FORMATS)}")
    folder = state.run(run)
    name, found, model, weights = open_checkpoint(run, state, checkpoint)
    out = out or state.root / "exports" / f"{run}-step{found.step}-{format}"
    job = load_stored(folder.job_file.read_text(encoding="utf-8"), Job, str(folder.job_file))
    tokenizer = _tokenizer(job, folder, state)
    manifest = write_export(
        out,
        weights,
        model,
        format=_FORMATS[format],
        origin=Origin(run=run, checkpoint=name, step=found.step, tokens=found.tokens),
        version=__version__,
        max_positions=job.data.sequence_length,
        end_of_text=tokenizer.end_of_text if tokenizer else None,
        extra=tokenizer.files if tokenizer else {},
    )
    _show(out, manifest, model, tokenizer is not None)
    return Exported(out, manifest)


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    manifest: ExportManifest


class OpenCheckpoint(NamedTuple):
    """A checkpoint as one model."""

    name: str
    manifest: Manifest
    model: ModelConfig
    weights: Weights

    def load(self, device: str = "cpu") -> Decoder:
        """In fp32, ready to be called."""
        model = materialize(lambda: Decoder(self.model), torch.device(device), seed=0)
        load_weights(model, self.weights)
        return model.eval()


def open_checkpoint(run: str, state: StateDir, checkpoint: str | None = None) -> OpenCheckpoint:
    """The weights in use of one of a run's checkpoints, whole from any layout.

    Args:
        run: its name.
        state: where it is.
        checkpoint: its name; None is the newest that is whole.

    Raises:
        ConfigError: there is no such run or checkpoint, or it is not whole.
    """
    store = CheckpointStore(Storage(state.run(run).read().checkpoints))
    entry = chosen(store, run, checkpoint)
    assert entry.manifest is not None
    model = ModelConfig.model_validate(entry.manifest.model)
    source = _Source(store, entry.name, entry.manifest)
    weights = CheckpointWeights(source.open, entry.manifest.files, model, entry.manifest.layout)
    return OpenCheckpoint(entry.name, entry.manifest, model, weights)


def chosen(store: CheckpointStore, run: str, name: str | None) -> Entry:
    """The checkpoint of this name, or the newest that is whole; raises ConfigError if there is none."""
    entries = store.entries()
    if name is None:
        valid = [entry for entry in entries if entry.problem is None]
        if not valid:
            raise ConfigError(f"{run}: has no checkpoint that is whole in {store.storage.location}")
        return valid[-1]
    found = [entry for entry in entries if entry.name == name]
    if not found:
        raise ConfigError(
            f"--checkpoint {name}: no such checkpoint of {run}; there are: "
            f"{', '.join(entry.name for entry in entries) or 'none'}"
        )
    if found[0].problem:
        raise ConfigError(f"{store.storage.path(name)}: {found[0].problem}")
    return found[0]


class _Source:
    """Opens files of a checkpoint; each is compared with its digest before it is first used."""

    def __init__(self, store: CheckpointStore, name: str, manifest: Manifest) -> None:
        self._store, self._name, self._manifest = store, name, manifest
        self._checked: set[str] = set()

    def open(self, file: str) -> BinaryIO:
        if file not in self._checked:
            if not self._store.intact(self._name, file, self._manifest):
                place = self._store.storage.path(f"{self._name}/{file}")
                raise ConfigError(
                    f"{place}: its content is not what was written (SHA-256 differs); name another with --checkpoint"
                )
            self._checked.add(file)
        return self._store.open(self._name, file)


def token_dataset(job: Job, folder: RunFolder, state: StateDir) -> TokenDataset | None:
    """The run's token shards, if they are still here."""
    try:
        shards = find(job.data, cache_dir=state.data, job_dir=Path(folder.read().job_dir))
    except ConfigError:  # the text has gone
        return None
    return None if shards is None else TokenDataset.open(shards, verify=False)


class _Tokenizer(NamedTuple):
    files: dict[str, bytes]
    end_of_text: int


def _tokenizer(job: Job, folder: RunFolder, state: StateDir) -> _Tokenizer | None:
    """The run's tokenizer as transformers reads it, if its token shards are still here."""
    dataset = token_dataset(job, folder, state)
    if dataset is None:
        return None
    document = (dataset.folder / TOKENIZER_FILE).read_bytes()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD if any(token["content"] == PAD for token in json.loads(document)["added_tokens"]) else None,
        "model_max_length": job.data.sequence_length,
    }
    files = {"tokenizer.json": document, "tokenizer_config.json": json.dumps(config, indent=2).encode()}
    return _Tokenizer(files, dataset.eot_id)


def _show(out: Path, manifest: ExportManifest, model: ModelConfig, has_tokenizer: bool) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table(Column("export", no_wrap=True), Column("", no_wrap=True), show_header=False)
    table.add_row("folder", str(out))
    table.add_row("format", manifest.architecture or manifest.format)
    table.add_row("from", f"{manifest.origin.run}, step {manifest.origin.step}, {manifest.origin.tokens:,} tokens")
    if isinstance(model.ffn, MoEConfig):
        table.add_row("experts", f"{model.num_layers} x {model.ffn.num_experts}")
    table.add_row("parameters", f"{manifest.parameters:,} in {manifest.dtype}")
    table.add_row("files", f"{len(manifest.files)}, {sum(file.size for file in manifest.files.values()) / 1e6:,.1f} MB")
    console.print(table)
    console.print(f"read back: every number of {manifest.tensors} tensors is the checkpoint's")
    if not has_tokenizer:
        console.print("without tokenizer.json: the run's token shards are not in this state directory")
