"""What can be known to fail before any worker starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tidegate.config import ConfigError
from tidegate.data import TokenDataset, check_tokenizer
from tidegate.data.loader import check_tuning_windows
from tidegate.model.flops import total
from tidegate.train.job import Job
from tidegate.train.memory import predict

__all__ = ["check_dataset", "check_machine", "check_space", "checkpoint_bytes_per_parameter", "hide_gpus"]


def check_machine(job: Job, *, local: bool, remote: bool) -> None:
    """The processes and devices that the job asks for, as far as this machine knows.

    Args:
        local: the loop runs in this process.
        remote: the workers run on a cluster that this machine does not see into.
    """
    if local and job.resources.workers != 1:
        raise ConfigError(
            f"--local runs one process, but resources.workers={job.resources.workers}; add --workers 1"
            + (" --set parallel.expert=1" if job.parallel.expert > 1 else "")
        )
    if job.resources.gpu and not remote:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("resources.gpu=True, but this machine has no CUDA device; use --set resources.gpu=false")
        field = "workers" if job.resources.min_workers is None else "min_workers"
        if job.world_sizes[0] > torch.cuda.device_count():
            raise ConfigError(
                f"resources.{field}={getattr(job.resources, field)} needs as many GPUs, this machine has "
                f"{torch.cuda.device_count()}"
            )
    if job.parallel.offload_folder is not None and not remote:
        _check_offload_folder(job, Path(job.parallel.offload_folder))


def _check_offload_folder(job: Job, folder: Path) -> None:
    """A folder that can be written, with room for the experts' master weights and moments."""
    name = f"parallel.offload_folder={folder}"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{name} is not a folder that can be written to on this machine; make it or name another")
    needed, free = predict(job).disk * job.resources.workers, shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{name}: no space left for master weights and moments of the experts: {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; name another folder, or none to keep them in memory"
        )


def hide_gpus(job: Job) -> None:
    """Keep the GPUs from this process and its children if the job does not want them: torch and DeepSpeed would."""
    if not job.resources.gpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


def checkpoint_bytes_per_parameter(job: Job) -> int:
    """What a checkpoint takes: the weights in use, their master copy in fp32 and AdamW's two moments."""
    weights = 2 if job.train.precision == "bf16" else 4
    moments = 2 if job.optimizer.state == "bf16" else 4
    # Without ZeRO DeepSpeed writes the master weights, and with bf16 weights the moments too, a second time.
    twice = 0 if job.parallel.zero_stage else {"fp32": 4, "bf16": 12}[job.train.precision]
    return weights + 4 + 2 * moments + twice


def check_space(job: Job, storage: Path, *, runs: int = 1, at_once: int = 1) -> None:
    """A folder that can be written, with room for the checkpoints that are kept and those being written.

    Args:
        storage: of the checkpoints.
        runs: like the job, that are still to be made.
        at_once: how many of them run at a time.
    """
    kept = job.checkpoint.kept
    size = total(job.model, job.data.sequence_length).params * checkpoint_bytes_per_parameter(job)
    needed = size * (runs * kept + at_once)
    existing = next(p for p in [storage, *storage.parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"checkpoint.storage={storage}: {existing} is not a folder that can be written to")
    free = shutil.disk_usage(existing).free
    if needed > free:
        each = f" of each of {runs} runs" if runs > 1 else ""
        raise ConfigError(
            f"{storage}: no space left for the checkpoints: {needed / 1e9:.1f} GB for {kept} that stay{each} "
            f"(checkpoint.keep_last={job.checkpoint.keep_last}) and {at_once} being written; {free / 1e9:.1f} GB are "
            "free"
        )


def check_dataset(job: Job, folder: Path, job_dir: Path) -> None:
    """The shards are whole, and their tokens fit the model's vocabulary."""
    dataset = TokenDataset.open(folder, verify=True)
    check_tokenizer(dataset, job.data, job_dir=job_dir)
    vocab_size = dataset.vocab_size
    if vocab_size > job.model.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {vocab_size} tokens, more than model.vocab_size={job.model.vocab_size}"
        )
    if job.model.self_tune is not None:
        check_tuning_windows(dataset, job.data)
