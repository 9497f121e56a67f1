"""What MLflow knows of a run beside metrics and params: tags to filter by, the data it reads, the models it gave.

docs/mlflow.md has the table of tags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tidegate.config import ConfigError
from tidegate.data.loader import scored_bytes, scored_fingerprint
from tidegate.data.shards import TokenDataset
from tidegate.launch.export import chosen
from tidegate.launch.state import StateDir
from tidegate.model.flops import total
from tidegate.model.gates import AttentionGate
from tidegate.model.moe import MoEConfig
from tidegate.track import DatasetUse, ModelEntry, check_model_name, log_model, logged_model, register_model
from tidegate.train.checkpoint_store import MANIFEST, CheckpointStore
from tidegate.train.export import ExportManifest
from tidegate.train.job import Job
from tidegate.train.storage import Storage

__all__ = ["dataset_uses", "job_tags", "record_export", "register_run"]

FINGERPRINT_DIGITS = 16
"""Of SHA-256, as people compare them."""


def job_tags(job: Job, dataset: TokenDataset, base: str | None, cluster: str) -> dict[str, str]:
    """What people filter and group runs by; names without dots or slashes, for MLflow's filter strings.

    Args:
        job: as it runs.
        dataset: its tokens.
        base: the job that it extends, if it does.
        cluster: kind of place that it runs in.
    """
    cost, gate, ffn = total(job.model, job.data.sequence_length), job.model.attention.gate, job.model.ffn
    is_moe = isinstance(ffn, MoEConfig)
    return {
        "base": base or "none",
        "cluster": cluster,
        "gate": gate.kind,
        "granularity": gate.granularity if isinstance(gate, AttentionGate) else "none",
        "router": ffn.router.kind if isinstance(ffn, MoEConfig) else "none",
        "balance": job.balance.scope if is_moe and job.balance.loss_weight > 0 else "none",
        "total_params": str(cost.params),
        "active_params": str(cost.active_params),
        "flops_per_token": f"{cost.flops_per_token:.0f}",
        "tokenizer": dataset.tokenizer_sha256[:FINGERPRINT_DIGITS],
        "scored_bytes": str(scored_bytes(dataset, job.data)),
        "validation": scored_fingerprint(dataset, job.data)[:FINGERPRINT_DIGITS],
    }


def dataset_uses(dataset: TokenDataset) -> Iterator[DatasetUse]:
    """Of each domain its training and its held-out text."""
    for domain in dataset.manifest.domains:
        for split, context in ((domain.train, "training"), (domain.held_out, "validation")):
            yield DatasetUse(
                name=domain.name,
                digest=hashlib.sha256("\n".join(shard.sha256 for shard in split.shards).encode()).hexdigest(),
                source={**domain.source.model_dump(mode="json"), "shards": str(dataset.folder)},
                profile={"documents": split.documents, "tokens": split.tokens, "source_bytes": domain.source.bytes},
                context=context,
            )


def record_export(run: str, state: StateDir, folder: Path, manifest: ExportManifest) -> bool:
    """Enter an export in MLflow as a model that the run gave; False where that failed, which hurts nothing."""
    origin, file = manifest.origin, folder / MANIFEST
    tags = {
        "digest": hashlib.sha256(file.read_bytes()).hexdigest(),
        "checkpoint": origin.checkpoint,
        "step": str(origin.step),
        "tokens": str(origin.tokens),
        "location": str(folder.absolute()),
    }
    try:
        handle = state.run(run).handle()
    except ConfigError:  # the store's password is nowhere
        return False
    return log_model(handle, ModelEntry(folder.name, manifest.format, origin.step, tags, file))


def register_run(run: str, state: StateDir, name: str, alias: str | None) -> None:
    """Make the run's newest export, or without any its newest checkpoint, a version of a registered model.

    Args:
        run: its name.
        state: where it is.
        name: of the registered model.
        alias: moved to the new version; None moves nothing.

    Raises:
        ConfigError: there is no such run, it has neither export nor whole checkpoint, MLflow does not answer, or it
            would not take the name or the alias.
    """
    check_model_name(name, alias)
    folder = state.run(run)
    handle = folder.handle()
    model: str | ModelEntry | None = logged_model(handle)
    if model is None:
        model = _checkpoint_entry(run, folder.read().checkpoints)
    version = register_model(handle, name, alias, model)
    what = "its newest export" if isinstance(model, str) else f"its checkpoint {model.tags['checkpoint']}"
    end = "" if alias is None else f", now {name}@{alias}"
    Console(highlight=False, markup=False, soft_wrap=True).print(f"{run}: {what} is {name} version {version}{end}")


def _checkpoint_entry(run: str, checkpoints: str) -> ModelEntry:
    store = CheckpointStore(Storage(checkpoints))
    entry = chosen(store, run, None)
    assert entry.manifest is not None
    with store.open(entry.name, MANIFEST) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    tags = {
        "digest": digest,
        "checkpoint": entry.name,
        "step": str(entry.manifest.step),
        "tokens": str(entry.manifest.tokens),
        "location": store.storage.path(entry.name),
    }
    return ModelEntry(f"{run}-step{entry.manifest.step}-checkpoint", "checkpoint", entry.manifest.step, tags, None)
