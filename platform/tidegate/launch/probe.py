"""`tidegate probe`: what a run's weights do, beside their loss; as tables, and as JSON that MLflow keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from tidegate.config import ConfigError, load_stored
from tidegate.data.shards import TokenDataset
from tidegate.data.tokenizer import load_tokenizer
from tidegate.launch.export import open_checkpoint, token_dataset
from tidegate.launch.state import StateDir
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, materialize
from tidegate.model.weights import load_weights
from tidegate.track import log_text
from tidegate.train.export import open_export
from tidegate.train.generate import samples_of
from tidegate.train.job import Job
from tidegate.train.probes import ContextLoss, Needle, context_losses, needles, observed

__all__ = ["SUITES", "check_device", "probe_run"]

SUITES = ("sink", "experts", "long", "recall", "samples", "lm_eval")
_DEPTHS = (0.0, 0.5, 1.0)
_OF_BLOCK = ("first_token", "first_token_uniform", "entropy", "gate_mean")
_OF_LAYER = ("domain_information", "maxvio", "dead_experts", "router_entropy", "top_k_share")


def probe_run(
    run: str,
    state: StateDir,
    suites: Sequence[str],
    sequences: int,
    checkpoint: str | None,
    device: str,
    tasks: str | None = None,
) -> Path:
    """Ask, print, and write what was found.

    Args:
        run: its name; for `lm_eval` alone also the folder of an export, which has its tokenizer.
        state: where it is.
        suites: some of `SUITES`.
        sequences: held-out ones that a probe reads, at most.
        checkpoint: name of one of its checkpoints; None is the newest that is whole.
        device: where the model goes, in fp32.
        tasks: of `lm_eval`, see `task_results`.

    Returns:
        The file, in the state directory and named after run and step.

    Raises:
        ConfigError: an argument is none of those; there is no such run or checkpoint; its token shards have gone.
    """
    if unknown := [suite for suite in suites if suite not in SUITES]:
        raise ConfigError(f"--suite {','.join(unknown)}: unknown; some of {', '.join(SUITES)}")
    if sequences < 2:
        raise ConfigError(f"--sequences {sequences}: must be at least 2")
    check_device(device)
    if ("lm_eval" in suites) != (tasks is not None):
        raise ConfigError("--suite lm_eval and --tasks go together: a folder of tasks, or names that lm-eval knows")
    if tasks is not None and Path(run).is_dir():
        return _ask_export(Path(run), state, suites, tasks, device)
    folder = state.run(run)
    job = load_stored(folder.job_file.read_text(encoding="utf-8"), Job, str(folder.job_file))
    dataset = token_dataset(job, folder, state)
    if dataset is None:
        raise ConfigError(f"{run}: its token shards, and with them its held-out text, are not in {state.data}")
    opened = open_checkpoint(run, state, checkpoint)
    model = opened.load(device)
    found = _ask(model, job, dataset, suites, sequences)
    if tasks is not None:
        isolate, length = job.data.documents == "isolate", job.data.sequence_length
        found["lm_eval"] = _ask_harness(model, dataset.tokenizer, dataset.eot_id, length, isolate, tasks)
    about = {"run": run, "checkpoint": opened.name, "step": opened.manifest.step, "tokens": opened.manifest.tokens}
    out, text = _written(state, f"{run}-step{opened.manifest.step}", {**about, "sequences": sequences, **found})
    try:
        log_text(folder.handle(), text, f"probes/step{opened.manifest.step}.json")
    except ConfigError:  # the store's password is nowhere
        print("not entered in MLflow, whose password is nowhere")
    return out


def check_device(device: str) -> None:
    """Raises ConfigError: PyTorch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _written(state: StateDir, name: str, found: Mapping[str, Any]) -> tuple[Path, str]:
    out, text = state.root / "probes" / f"{name}.json", json.dumps(found, indent=1) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out, text


def _ask_export(folder: Path, state: StateDir, suites: Sequence[str], tasks: str, device: str) -> Path:
    if others := [suite for suite in suites if suite != "lm_eval"]:
        raise ConfigError(f"{folder}: an export has no held-out text for --suite {','.join(others)}; give the run")
    config, weights = open_export(folder)
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if missing := [file.name for file in files if not file.exists()]:
        raise ConfigError(f"{folder}: has no {' and no '.join(missing)}, which tasks need")
    built = load_tokenizer(files[0].read_bytes(), str(files[0]))
    length = json.loads(files[1].read_text(encoding="utf-8")).get("model_max_length")
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"{files[1]}: model_max_length={length} must be the tokens that the model was trained on")
    model = materialize(lambda: Decoder(config), torch.device(device), seed=0)
    load_weights(model, weights)
    found = _ask_harness(model.eval(), built.tokenizer, built.eot_id, length, False, tasks)
    return _written(state, folder.absolute().name, {"export": str(folder.absolute()), "lm_eval": found})[0]


def _ask_harness(
    model: Decoder, tokenizer: Tokenizer, eot_id: int, length: int, isolate: bool, tasks: str
) -> dict[str, dict[str, float]]:
    try:
        from tidegate.launch.lm_eval import HarnessModel, task_results
    except ModuleNotFoundError as error:
        raise ConfigError(f"--suite lm_eval: no module {error.name}; pip install 'tidegate[eval]' brings it") from error
    found = task_results(HarnessModel(model, tokenizer, eot_id, length, isolate), tasks)
    table = Table("task", "metric", "value")
    for task, metrics in found.items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}")
    Console(highlight=False).print(table)
    return found


def _ask(model: Decoder, job: Job, dataset: TokenDataset, suites: Sequence[str], sequences: int) -> dict[str, Any]:
    """What is written, and its tables on the way."""
    console, length = Console(highlight=False), job.data.sequence_length
    found: dict[str, Any] = {}
    if {"sink", "experts"}.intersection(suites):
        metrics = observed(model, job, dataset, sequences)
        for suite, prefixes in (("sink", ("attention/", "hidden/")), ("experts", ("moe/",))):
            if suite in suites:
                found[suite] = {name: value for name, value in metrics.items() if name.startswith(prefixes)}
                _tables_of(suite, found[suite], job, console)
    if "long" in suites:
        losses = context_losses(model, job, dataset, [length // 2, length, 2 * length, 4 * length], sequences)
        found["long"] = [loss._asdict() for loss in losses]
        console.print(_contexts(losses, length))
    if "recall" in suites:
        asked = needles(model, job, dataset, [length // 2, length, 2 * length], _DEPTHS, sequences)
        found["recall"] = [needle._asdict() for needle in asked]
        console.print(_needles(asked, length))
    if "samples" in suites:
        samples = samples_of(model, job, dataset, 1, Clock(0, 0, 0))
        found["samples"] = [sample._asdict() for sample in samples]
        for sample in samples:
            console.print(f"{sample.domain}: {sample.prompt!r} goes on {sample.greedy!r}", markup=False)
    return found


def _tables_of(suite: str, metrics: Mapping[str, float], job: Job, console: Console) -> None:
    if suite == "sink":
        table = Table("block", *(name.replace("_", " ") for name in _OF_BLOCK), "largest activation")
        for block in range(job.model.num_layers):
            cells = [metrics.get(f"attention/{block}/{name}") for name in _OF_BLOCK]
            table.add_row(str(block), *map(_cell, [*cells, metrics.get(f"hidden/{block}/max")]))
        console.print(table)
        if "attention/sink_heads" in metrics:
            console.print(f"sink heads: {metrics['attention/sink_heads']:.1%}")
    else:
        layers = sorted({int(name.split("/")[1]) for name in metrics if name.endswith("/domain_information")})
        table = Table("layer", *(name.replace("_", " ") for name in _OF_LAYER))
        for layer in layers:
            table.add_row(str(layer), *(_cell(metrics.get(f"moe/{layer}/{name}")) for name in _OF_LAYER))
        console.print(table if layers else "experts: the model is dense")


def _contexts(losses: Sequence[ContextLoss], length: int) -> Table | str:
    if not losses:
        return f"long: no domain has held-out text of {4 * length + 1:,} tokens"
    table = Table("context, tokens", "of the training length", "loss of the same tokens")
    for loss in losses:
        table.add_row(f"{loss.context:,}", f"{loss.context / length:g}", f"{loss.nll:.3f}")
    return table


def _needles(asked: Sequence[Needle], length: int) -> Table | str:
    if not asked:
        return f"recall: no domain has held-out text of {2 * length:,} tokens"
    table = Table("context, tokens", "depth", "loss of the needle's end", "without the needle", "found")
    for needle in asked:
        cells = (f"{needle.depth:g}", f"{needle.nll:.3f}", f"{needle.nll_without:.3f}", f"{needle.found:.0%}")
        table.add_row(f"{needle.context:,}", *cells)
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
