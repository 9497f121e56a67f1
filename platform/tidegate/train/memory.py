"""What a job is predicted to allocate on one GPU at its largest moment, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from tidegate.config import ConfigError
from tidegate.model.memory import model_on_meta, pass_memory
from tidegate.parallel.memory import MoEShare, state_memory
from tidegate.train.job import Job

__all__ = ["MemoryPrediction", "out_of_memory_explained", "predict"]

_MARGIN = 0.02  # reserved above allocated on H100s: 1 to 2 %, with two of them up to 8 (docs/memory.md)
_TOKEN_BYTES = 13  # of a batch on the device: id, document, whether it counts


class MemoryPrediction(NamedTuple):
    """Bytes. A step has two largest moments: in a pass, and when all passes are over and the optimizer moves."""

    weights: int
    """In use."""
    gradients: int
    """That stay between micro-batches, in the dtype of the weights."""
    gradient_sums: int
    """fp32 sums over micro-batches."""
    master_weights: int
    moments: int
    """Of AdamW."""
    activations: int
    """Kept for the backward pass, and the batch."""
    working: int
    """What a pass holds at its largest moment beyond all of these."""
    step: int
    """What the reduction of gradients and the optimizer hold in place of activations and working memory."""
    margin: int
    """For what libraries allocate, and for blocks that do not fit."""
    host: int = 0
    """Not on the GPU but in the host's memory, for this rank: what `parallel.offload` keeps there."""
    disk: int = 0
    """Of this rank in `parallel.offload_folder`."""

    @property
    def parts(self) -> dict[str, int]:
        """What is there at the largest moment; adds up to `total`."""
        parts = self._asdict()
        in_pass = self.activations + self.working >= self.step
        for elsewhere in ("step",) if in_pass else ("activations", "working"):
            del parts[elsewhere]
        del parts["host"], parts["disk"]
        return parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def predict(job: Job) -> MemoryPrediction:
    """Predict from the job alone; nothing is allocated."""
    train, parallel = job.train, job.parallel
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    moe = partial(MoEShare, expert_size=parallel.expert, keep_rows=train.keep_rows)
    model = model_on_meta(job.model, dtype, moe=moe, recompute=train.recompute)
    state = state_memory(model, parallel, job.resources.workers, train.precision, job.optimizer.state)
    passes = pass_memory(
        model,
        micro_batch=train.micro_batch,
        sequence_length=job.data.sequence_length,
        isolate=job.data.documents == "isolate",
        kernels="auto" if job.runs_triton else "reference",
    )
    batch = _TOKEN_BYTES * train.batch_tokens // job.resources.workers
    kept_bucket = state.bucket if parallel.zero_stage == 1 else 0  # from one micro-batch to the next
    largest = max(passes.forward + kept_bucket, passes.backward + state.bucket)
    prediction = MemoryPrediction(
        weights=state.weights,
        gradients=state.gradients,
        gradient_sums=state.gradient_sums,
        master_weights=state.master_weights,
        moments=state.moments,
        activations=passes.saved + batch,
        working=largest - passes.saved,
        step=state.step + round(state.still_saved * passes.saved),
        margin=0,
        host=state.host,
        disk=state.disk,
    )
    return prediction._replace(margin=round(_MARGIN * prediction.total))


@contextmanager
def out_of_memory_explained(job: Job) -> Iterator[None]:
    """Give an allocation that fails, on a GPU or on the host, the fields of the job that decide it.

    Raises:
        ConfigError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise ConfigError(
            f"out of memory, train.micro_batch={job.train.micro_batch} is too much here; lower it, or set "
            f"train.recompute=true or parallel.offload (docs/memory.md): {' '.join(str(error).split())[:200]}"
        ) from error
