"""DeepSpeed's checkpoint files without a disk: what it saves is copied to host memory, what it loads is handed to it.

DeepSpeed writes and reads through its `CheckpointEngine`; this one keeps its names and its contents and nothing else
of it. The copy is the only part of a save for which training stands still: the host tensors belong to the snapshot, so
that they can be written while the next step changes the originals.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from tidegate.parallel.reshape import load_universal, universal_checkpoint

__all__ = ["Fetch", "HostSnapshots", "Put", "read_plain"]

Put = Callable[[str, Any], None]
"""Takes the name of a file and its content: a nest of dicts and lists with tensors in host memory."""
Fetch = Callable[[str], BinaryIO]
"""Opens a file, seekable, by the name that `Put` got."""

_ROOT, _TAG, _MODEL = "checkpoint", "state", "mp_rank_00_model_states.pt"
_PLAIN_TYPES = [LossScaler, ZeroStageEnum, fragment_address, set]
"""All that DeepSpeed's files hold beside tensors, containers and numbers; anything else is not unpickled."""
_SMALLEST_PINNED = 1 << 20  # bytes; registering a smaller block costs more than its copy


class HostSnapshots(CheckpointEngine):
    """DeepSpeed's door to files. One snapshot at a time: the next `save` writes over the tensors of the last.

    Args:
        engine: whose checkpoints these are.
        device: of its tensors.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device) -> None:
        super().__init__()
        self.name = type(self).__name__
        self._engine, self._device = engine, device
        self._put: Put | None = None
        self._fetch: Fetch | None = None
        self._loading_from = ""
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        engine.checkpoint_engine = self
        engine._copy_recovery_script = lambda save_path: None  # a checkpoint holds no code; DeepSpeed ships its scripts

    def take(self, put: Put, state: dict[str, Any]) -> None:
        """Copy this rank's part to host memory and give it to `put`, file by file; every rank must call it.

        Args:
            put: keeps what it gets until the next `take`.
            state: plain values that go into DeepSpeed's client state.
        """
        self._put = put
        self._engine.save_checkpoint(_ROOT, tag=_TAG, client_state=state, save_latest=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies into pinned memory are under way until here

    def restore(self, fetch: Fetch, names: Iterable[str]) -> dict[str, Any]:
        """Load this rank's part; returns the client state. Every rank must call it.

        Args:
            fetch: opens a file of the checkpoint.
            names: of all of its files.
        """
        self._fetch = fetch
        with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
            for name in names:  # DeepSpeed looks on disk for what there is before it asks for the contents
                place = Path(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            self._loading_from = folder
            path, state = self._engine.load_checkpoint(folder, tag=_TAG)
        assert path is not None
        return state

    def restore_reshaped(self, fetch: Fetch, names: Iterable[str]) -> dict[str, Any]:
        """`restore` of a checkpoint that another number of ranks wrote, another expert parallelism or ZeRO stage.

        Weights, moments and steps come from the universal form, all else of the model from rank 0's file.
        """
        self._fetch = fetch
        self._loading_from = ""
        with universal_checkpoint(self.load, names, _TAG) as folder, _universal(self._engine):
            model = self.load(f"{_TAG}/{_MODEL}")["module"]
            missing, unexpected = self._engine.module.load_state_dict(model, strict=False)
            assert not unexpected, unexpected
            assert all(name.rpartition(".")[0].endswith(".experts") for name in missing), missing
            self._loading_from = str(folder)
            path, state = self._engine.load_checkpoint(str(folder), tag=_TAG)
        assert path is not None
        return state

    # --- what DeepSpeed calls ------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def preserves_storage_sharing(self) -> bool:
        return False  # views are copied as what they show; DeepSpeed need not copy them on the device first

    def save(self, state_dict: Any, path: str) -> None:
        assert self._put is not None
        name = os.path.relpath(path, _ROOT)
        self._put(name, _Copier(name, self._buffers).on_host(state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        assert self._fetch is not None
        return read_plain(self._fetch, os.path.relpath(path, self._loading_from))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


@contextmanager
def _universal(engine: DeepSpeedEngine) -> Iterator[None]:
    """What `checkpoint.load_universal` in DeepSpeed's settings does, for a while."""
    optimizer = engine.optimizer
    optimizer._load_universal_checkpoint = lambda folder, *_: load_universal(optimizer, Path(folder))
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
        del optimizer._load_universal_checkpoint


def read_plain(fetch: Fetch, name: str) -> Any:
    """A file's content, on the CPU; a file cannot bring code."""
    with fetch(name) as file, torch.serialization.safe_globals(_PLAIN_TYPES):
        return torch.load(file, map_location="cpu", weights_only=True)


class _Copier:
    """Copies one file's tensors into buffers that stay from save to save; tensors that share memory share a copy."""

    def __init__(self, name: str, buffers: dict[tuple[str, int], torch.Tensor]) -> None:
        self._name, self._buffers = name, buffers
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def on_host(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy(value.detach())
        if isinstance(value, dict):
            return type(value)((key, self.on_host(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(map(self.on_host, value))
        if isinstance(value, Enum):  # before Python 3.11.4 one is written as a call of getattr, which is not read again
            return value.value
        return value

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if same in self._copies and tensor.numel():
            return self._copies[same]
        place = (self._name, len(self._copies))
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            if buffer is not None:
                _unpin(buffer)
            # zeros, written by all threads: pinning would fetch the pages one by one, which takes three times as long
            buffer = self._buffers[place] = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            if tensor.is_cuda:
                _pin(buffer)
        buffer.copy_(tensor, non_blocking=True)
        self._copies[same] = buffer
        return buffer


def _pin(buffer: torch.Tensor) -> None:
    """Lock the memory, so that the device writes it directly. torch's own pinned memory comes in powers of two."""
    if buffer.nbytes < _SMALLEST_PINNED:
        return
    refused = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if refused:  # the copy is slower, and CUDA would blame its next kernel: let that be one that nobody misses
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")


def _unpin(buffer: torch.Tensor) -> None:
    if buffer.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
