"""Routed experts that live in the host's memory, whole: weights, gradient sums, master weights and moments.

A layer's weights come to the device for the time of its passes (`prefetch.py`). So does its fp32 gradient sum: the
device adds a micro-batch's gradient, by the kernel that adds it where sums stay on the device, and the sum goes back.
That is 4 bytes a parameter each way, where gradients that are summed by the host would be 2 one way; it costs no time
of the host, and the sums have the same bits. `docs/memory.md` has the arithmetic.

For AdamW, too, everything comes to the device, chunk by chunk (`streamed_adamw.py`). Master weights and moments are
spread over replicas, as ZeRO 1 does: each replica moves its part, and they exchange what they moved.

Letters: n numbers of a layer, padded to whole parts of its replicas; p numbers of a part; E experts of this rank.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tidegate.parallel.expert_layout import Layout, Piece
from tidegate.parallel.prefetch import Lane, Ring
from tidegate.parallel.streamed_adamw import Moved, StreamedAdamW
from tidegate_kernels.adamw import Rates, StepFactors, step_factors
from tidegate_kernels.gradient_sum import add_gradients

__all__ = ["BUFFERS", "ExpertStore", "StoreSettings"]

BUFFERS = 2
"""Layers on the device at a time: one that computes, one that is fetched."""


class StoreSettings(NamedTuple):
    """AdamW's settings, and where things are."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    num_replicas: int
    """Ranks that hold the same experts."""
    replica: int
    """Which of them this one is."""
    folder: Path | None
    """For master weights and moments; None: in memory."""
    moments: torch.dtype
    """fp32, or bf16, which are rounded stochastically."""


class _Layer(NamedTuple):
    """A layer on the host."""

    layout: Layout
    weights_n: torch.Tensor
    """bf16, in use."""
    sums_n: torch.Tensor
    """fp32, of gradients over micro-batches."""
    master_p: torch.Tensor
    """fp32."""
    mean_p: torch.Tensor
    square_p: torch.Tensor


class ExpertStore:
    """The routed experts of all layers of a rank.

    Args:
        device: that computes.
        settings: see there.
    """

    group: Any = None
    """Process group of the replicas; DeepSpeed makes it."""

    def __init__(self, device: torch.device, settings: StoreSettings) -> None:
        self.device, self.settings = device, settings
        self.arrivals, self._down = Lane(device), Lane(device)
        self._layers: list[_Layer] = []
        self._step = 0
        self._last = False
        self._backward_follows = False
        self._started: set[int] = set()
        """Layers that have a sum in this step."""
        self._norms: list[torch.Tensor] = []
        """() of the parts of the sums, of the layers that are complete."""
        self._announced: set[int] = set()
        """Layers whose experts are known before their turn, in every forward pass."""
        self._chosen: dict[int, frozenset[int]] = {}
        """Of them, the experts of the last forward pass."""
        self._missed = torch.zeros((), dtype=torch.bool, device=device)
        """Whether a row went to an expert that was not announced, in this step."""
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    # --- filling

    def add(self, pieces: Mapping[str, Piece]) -> int:
        """Make room for the next layer; its number."""
        layout, cpu = Layout(pieces, self.settings.num_replicas), torch.device("cpu")
        n, p = layout.padded, layout.padded // layout.num_replicas
        weights_n = _pinned(torch.zeros(n, dtype=torch.bfloat16, device=cpu), self.device)
        sums_n = _pinned(torch.zeros(n, device=cpu), self.device)
        name, moments = f"layer{len(self._layers)}", self.settings.moments
        kept = {"master": torch.float32, "mean": moments, "square": moments}
        parts = [zeros(self.settings.folder, f"{name}.{what}", p, dtype) for what, dtype in kept.items()]
        if self.settings.folder is None:
            parts = [_pinned(part, self.device) for part in parts]
        self._layers.append(_Layer(layout, weights_n, sums_n, *parts))
        return len(self._layers) - 1

    @torch.no_grad()
    def fill(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set a layer's weights; master weights begin as what bf16 leaves of them, as DeepSpeed's do."""
        held = self._layers[layer]
        for (start, stop, _), tensor in zip(held.layout.places(), tensors.values(), strict=True):
            held.weights_n[start:stop].copy_(tensor.reshape(-1))
        held.master_p.copy_(held.weights_n[self._mine(layer)])

    def _mine(self, layer: int) -> slice:
        """The part that this replica moves."""
        p = len(self._layers[layer].master_p)
        return slice(self.settings.replica * p, (self.settings.replica + 1) * p)

    # --- passes

    @cached_property
    def _weights(self) -> Ring:
        return self._ring([layer.weights_n for layer in self._layers])

    @cached_property
    def _sums(self) -> Ring:
        return self._ring([layer.sums_n for layer in self._layers])

    def _ring(self, hosts: Sequence[torch.Tensor]) -> Ring:
        ranges = [layer.layout.ranges for layer in self._layers]
        return Ring(hosts, BUFFERS, self.device, ranges, self.arrivals)

    def _all(self, layer: int) -> frozenset[int]:
        return frozenset(range(self._layers[layer].layout.num_experts))

    def lend(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's weights by name, for autograd to give their gradients to this store."""
        pieces = self._layers[layer].layout.pieces
        self._backward_follows = torch.is_grad_enabled()  # inside of the function below it is not
        return dict(zip(pieces, _Lent.apply(self._anchor, self, layer), strict=True))

    def flat(self, layer: int) -> torch.Tensor:
        """(n,) of a layer's weights on the device; the layer that is next in this pass is fetched meanwhile."""
        weights_n = self._weights.get(layer, self._wanted(layer))
        backward = in_backward()
        following = layer - 1 if backward else layer + 1
        if backward and layer in self._started:
            self._sums.prefetch(layer, self._all(layer))
        if following == len(self._layers) and not self._backward_follows:
            following = 0  # the next pass is a forward pass; before a backward pass the last layers stay
        if 0 <= following < len(self._layers) and (backward or following not in self._announced):
            self._weights.prefetch(following, self._wanted(following))
        return weights_n

    def announces(self, layer: int) -> None:
        """From now on `choose` is called for the layer before its turn."""
        self._announced.add(layer)

    def choose(self, layer: int, chosen_E: torch.Tensor) -> None:
        """Fetch the experts that a layer will need in this pass, and no others.

        Args:
            chosen_E: (E,) bool, on the host.
        """
        self._chosen[layer] = frozenset(chosen_E.nonzero().flatten().tolist())
        self._weights.prefetch(layer, self._chosen[layer])

    def check(self, used_E: torch.Tensor, chosen_E: torch.Tensor) -> None:
        """Note on the device whether a layer uses experts that were not announced; `step` refuses then."""
        self._missed |= (used_E & ~chosen_E).any()

    def _wanted(self, layer: int) -> frozenset[int]:
        return self._chosen.get(layer, self._all(layer))

    def views(self, layer: int) -> tuple[torch.Tensor, ...]:
        """A layer's weights on the device, piece by piece."""
        flat_n = self.flat(layer)
        return tuple(same_memory(flat_n, start, piece.shape) for start, _, piece in self._layers[layer].layout.places())

    def lies_here(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a lent one, or a view of it."""
        return self._weights.holds(tensor)

    def release(self, layer: int) -> None:
        """All that reads a layer's weights in this forward pass is queued."""
        if not in_backward():  # there it is a block that runs again, and whose backward pass follows
            self._weights.release(layer)

    def begin_backward(self, *, last: bool) -> None:
        """Of a micro-batch, the last of its step or not."""
        self._last = last

    @torch.no_grad()
    def take(self, layer: int, gradients: Sequence[torch.Tensor]) -> None:
        """Add a micro-batch's gradients of a layer; the last time in a step, sum over replicas too."""
        self._weights.release(layer)
        layout, everyone = self._layers[layer].layout, self._all(layer)
        first = layer not in self._started
        self._started.add(layer)
        sums_n = self._sums.overwrite(layer, everyone) if first else self._sums.get(layer, everyone)
        for (start, stop, _), gradient in zip(layout.places(), gradients, strict=True):
            add_gradients(sums_n[start:stop], [gradient.reshape(-1)], first=first)
        whole = slice(0, layout.padded)
        if self._last:
            sums_n[layout.numbers :].zero_()
            whole = self._mine(layer)
            if layout.num_replicas > 1:
                dist.reduce_scatter_tensor(sums_n[whole], sums_n, group=self.group)
            self._norms.append(torch.linalg.vector_norm(sums_n[whole]))
        self._sums.write_back(layer, whole.start, whole.stop, self._down)

    # --- a step

    def gradient_norm(self) -> torch.Tensor:
        """() of this rank's part of the sums of all layers."""
        assert len(self._norms) == len(self._layers), (len(self._norms), len(self._layers))
        return torch.linalg.vector_norm(torch.stack(self._norms))

    @torch.no_grad()
    def step(self, scale: torch.Tensor, skip: torch.Tensor, learning_rate: float) -> None:
        """Move all layers, unless the step is to be skipped.

        Args:
            scale: () factor of the gradients, which averages and clips.
            skip: () 1 to leave everything as it is, else 0.
            learning_rate: of this step.
        """
        # The host waits for the end of the backward pass.
        skipped, missed = torch.stack([skip, self._missed.float()]).tolist()
        assert not missed, "a router decided otherwise than it had announced"
        self._down.finish()
        self.arrivals.finish()
        self._started.clear()
        self._norms.clear()
        if skipped:
            return
        self._step += 1
        self._weights.forget()
        number = torch.tensor(float(self._step), device=self.device)
        factors = step_factors(number, self.settings.betas, scale, skip)
        moved = [self._moved(layer) for layer in range(len(self._layers))]
        adamw = StreamedAdamW(self.device, max(moved, key=lambda part: len(part.weights_N)))
        before = 0  # numbers of the layers before
        for layer, part in enumerate(moved):
            self._move(adamw, layer, part, before, factors, learning_rate)
            before += self._layers[layer].layout.padded
        adamw.finish()
        self._share()

    def _moved(self, layer: int) -> Moved:
        """This replica's part of a layer."""
        held, mine = self._layers[layer], self._mine(layer)
        return Moved(held.master_p, held.weights_n[mine], held.sums_n[mine], held.mean_p, held.square_p)

    def _move(
        self,
        adamw: StreamedAdamW,
        layer: int,
        moved: Moved,
        before: int,
        factors: StepFactors,
        learning_rate: float,
    ) -> None:
        mine, settings = self._mine(layer), self.settings
        for begins, ends, piece in self._layers[layer].layout.places():
            start, stop = max(begins, mine.start), min(ends, mine.stop)
            if start < stop:
                rates = Rates(learning_rate, settings.betas, settings.eps, settings.weight_decay * piece.decayed)
                adamw.move(moved.part(start - mine.start, stop - mine.start), factors, rates, before + start)

    def _share(self) -> None:
        """Give the other replicas what this one has moved, and fetch what the next pass begins with."""
        if self.settings.num_replicas > 1:
            for layer, held in enumerate(self._layers):
                weights_n, mine = self._weights.overwrite(layer, frozenset()), self._mine(layer)
                weights_n[mine].copy_(held.weights_n[mine], non_blocking=True)
                dist.all_gather_into_tensor(weights_n, weights_n[mine], group=self.group)
                self._weights.write_back(layer, 0, held.layout.padded, self._down)
            self._down.finish()
        for layer in range(min(BUFFERS, len(self._layers))):
            if layer not in self._announced:
                self._weights.prefetch(layer, self._all(layer))

    # --- checkpoints

    def state(self) -> list[dict[str, Any]]:
        """Of each layer this rank's master weights and moments themselves; weights in use follow from them."""
        return [
            {"step": self._step, "master": held.master_p, "mean": held.mean_p, "square": held.square_p}
            for held in self._layers
        ]

    @torch.no_grad()
    def load_state(self, read: Callable[[int], Mapping[str, Any]]) -> None:
        """Set what `state` gave on the same rank of the same layout; every rank calls it.

        Args:
            read: gives a layer's; one is held at a time.
        """
        self.arrivals.finish()
        self._weights.forget()
        for layer, held in enumerate(self._layers):
            stored = read(layer)
            self._step = stored["step"]
            held.master_p.copy_(stored["master"])
            held.mean_p.copy_(stored["mean"])
            held.square_p.copy_(stored["square"])
            held.weights_n[self._mine(layer)].copy_(held.master_p)
        self._share()


class _Lent(torch.autograd.Function):
    """Weights of a layer whose gradients go to the store."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, store: ExpertStore, layer: int) -> tuple[torch.Tensor, ...]:
        ctx.store, ctx.layer = store, layer
        return store.views(layer)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.store.take(ctx.layer, gradients)
        return None, None, None


def in_backward() -> bool:
    """Whether autograd is running a backward pass, in this thread."""
    return torch._C._current_graph_task_id() != -1


def same_memory(flat_n: torch.Tensor, start: int, shape: Sequence[int], stride: Sequence[int] = ()) -> torch.Tensor:
    """A tensor in the memory of another that is no view of it for autograd.

    Args:
        flat_n: contiguous.
        start: first number in it.
        shape, stride: of the result; contiguous by default.
    """
    strides = (tuple(stride),) if stride else ()
    place = flat_n.storage_offset() + start
    return flat_n.new_empty(0).set_(flat_n.untyped_storage(), place, tuple(shape), *strides)


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, locked in place for copies from and to a GPU; torch's own pinned memory is rounded to powers of 2."""
    if device.type == "cuda":
        runtime = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if status != 0:
            raise RuntimeError(f"the host cannot lock {tensor.nbytes:,} bytes for experts: cudaHostRegister: {status}")
        weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor


def zeros(folder: Path | None, name: str, numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """(numbers,) zeros, in memory or mapped to a file that goes with the process, however that ends."""
    if folder is None or numbers == 0:
        return torch.zeros(numbers, dtype=dtype, device="cpu")
    size = numbers * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix=f"tidegate-{os.getpid()}-{name}-", dir=folder) as file:
        try:
            # Room for all of it now: a disk that is full later would kill the process where it writes to memory.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno, f"parallel.offload_folder={folder}: {error.strerror}, {size:,} bytes for {name}"
            ) from error
        return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype, device="cpu")
