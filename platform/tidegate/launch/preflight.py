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

__all__ = ["BYTES_PER_PARAMETER", "check_dataset", "check_machine", "check_space", "hide_gpus"]

BYTES_PER_PARAMETER = 16  # weights in use and, in fp32, master weights and two moments


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


def check_space(job: Job, storage: Path) -> None:
    """A folder that can be written, with room for the checkpoints that are kept and the one being written."""
    params = total(job.model, job.data.sequence_length).params
    needed = params * BYTES_PER_PARAMETER * (job.checkpoint.kept + 1)
    existing = next(p for p in [storage, *storage.parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"checkpoint.storage={storage}: {existing} is not a folder that can be written to")
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"{storage}: no space left for the checkpoints: {needed / 1e9:.1f} GB for {job.checkpoint.kept} that stay "
            f"(checkpoint.keep_last={job.checkpoint.keep_last}) and one being written; {free / 1e9:.1f} GB are free"
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
