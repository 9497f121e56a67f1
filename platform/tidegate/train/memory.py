"""What a job is predicted to allocate on one GPU at its largest moment, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch

from tidegate.config import ConfigError
from tidegate.model.decoder import Decoder, ModelConfig
from tidegate.model.memory import PassMemory, model_on_meta, pass_memory
from tidegate.parallel.memory import LOAD_SKEW, MoEShare, state_memory
from tidegate.train.job import Job
from tidegate_kernels.choice import Kernels

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


class _Build(NamedTuple):
    """What a rank's share of a model hangs on."""

    config: ModelConfig
    precision: Literal["fp32", "bf16"]
    expert_size: int
    load_skew: float
    keep_rows: bool
    recompute: bool

    def model(self) -> Decoder:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        moe = partial(MoEShare, expert_size=self.expert_size, skew=self.load_skew, keep_rows=self.keep_rows)
        return model_on_meta(self.config, dtype, moe=moe, recompute=self.recompute)


@lru_cache(maxsize=1024)
def _passes(build: _Build, micro_batch: int, sequence_length: int, isolate: bool, kernels: Kernels) -> PassMemory:
    """Layouts that differ in what the optimizer holds alone share it."""
    return pass_memory(
        build.model(), micro_batch=micro_batch, sequence_length=sequence_length, isolate=isolate, kernels=kernels
    )


def predict(job: Job, load_skew: float = LOAD_SKEW) -> MemoryPrediction:
    """Predict from the job alone; nothing is allocated.

    Args:
        job: what is trained, and where.
        load_skew: with expert parallelism, assignments that a rank's experts get, over the mean of the ranks.
    """
    train, parallel = job.train, job.parallel
    build = _Build(job.model, train.precision, parallel.expert, load_skew, train.keep_rows, train.recompute)
    state = state_memory(build.model(), parallel, job.resources.workers, train.precision, job.optimizer.state)
    isolate = job.data.documents == "isolate"
    kernels: Kernels = "auto" if job.runs_triton else "reference"
    passes = _passes(build, train.micro_batch, job.data.sequence_length // parallel.sequence, isolate, kernels)
    batch = _TOKEN_BYTES * train.batch_tokens * parallel.sequence // job.resources.workers
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
