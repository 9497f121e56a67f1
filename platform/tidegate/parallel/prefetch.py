"""Layers' tensors that live in the host's memory, brought to the device while another layer computes.

A `Ring` has fewer buffers on the device than there are layers. What was fetched stays until its buffer is wanted for
another layer, so the layers that end a forward pass are there when the backward pass begins with them. Copies run in
`Lane`s, beside the stream that computes; on a CPU the same code copies at once.

Letters: n numbers of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

__all__ = ["PAST", "Lane", "Mark", "Ranges", "Ring"]

Ranges = Callable[[frozenset[int]], list[tuple[int, int]]]
"""Where the numbers of some experts lie in a layer's flat tensor, as (start, stop)."""


class Mark(NamedTuple):
    """A moment of a lane; None on a CPU, where it has passed."""

    event: torch.cuda.Event | None = None


PAST = Mark()
_ALIGN = 64  # numbers; matrix products want addresses of whole 16 bytes


class Lane:
    """A queue of copies beside the stream that computes.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy; the side on the host is pinned."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def after_compute(self) -> None:
        """What is queued from now on begins after what is queued on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def after(self, mark: Mark) -> None:
        """What is queued from now on begins after the mark, of another lane."""
        if self._stream is not None and mark.event is not None:
            self._stream.wait_event(mark.event)

    def mark(self) -> Mark:
        """When all that is queued so far has ended."""
        return PAST if self._stream is None else Mark(self._stream.record_event())

    def now(self) -> Mark:
        """When all that is queued so far on the current stream has ended."""
        if self._stream is None:
            return PAST
        return Mark(torch.cuda.current_stream(self._stream.device).record_event())

    def wait(self, mark: Mark) -> None:
        """The current stream waits for a mark; `tidegate bench` times this as waiting for experts."""
        if self._stream is not None and mark.event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark.event)

    def finish(self) -> None:
        """The host waits for all that is queued."""
        if self._stream is not None:
            self._stream.synchronize()


class _Place:
    """A buffer, and what is in it or on its way."""

    def __init__(self, buffer_n: torch.Tensor) -> None:
        self.buffer_n = buffer_n
        self.experts: frozenset[int] = frozenset()
        """Whose numbers are here."""
        self.arrived = PAST
        """When they are; past once the current stream has waited."""
        self.read: Mark | None = None
        """When the current stream has done with them; None while it has not, as with the zeros of the beginning."""
        self.written = PAST
        """When the last copy to the host has read the buffer."""


class Ring:
    """A few buffers for the tensors of many layers.

    Args:
        hosts: (n,) of each layer, on the host.
        num: buffers; no more than layers are made.
        device: where they are.
        ranges: of each layer.
        up: queue of the copies to the device.
    """

    def __init__(
        self,
        hosts: Sequence[torch.Tensor],
        num: int,
        device: torch.device,
        ranges: Sequence[Ranges],
        up: Lane,
    ) -> None:
        self._hosts, self._ranges, self._up = hosts, ranges, up
        longest = -(-max(len(host_n) for host_n in hosts) // _ALIGN) * _ALIGN
        # Zeros: matrix products may read an expert that was not fetched, times zero, which must not be NaN.
        buffers = torch.zeros(min(num, len(hosts)), longest, dtype=hosts[0].dtype, device=device)
        self._free = [_Place(buffer_n) for buffer_n in buffers]
        self._places: dict[int, _Place] = {}
        """By layer, the least recently used first."""
        self._written: dict[int, Mark] = {}
        """By layer, when the last copy to its host tensor has ended."""
        self._pointer = buffers.untyped_storage().data_ptr()

    def prefetch(self, layer: int, experts: frozenset[int]) -> None:
        """Begin to fetch what is not here of a layer. All that reads the buffer's last content is queued already."""
        place = self._claim(layer)
        missing = experts - place.experts
        if not missing:
            return
        if place.read is None:
            self._up.after_compute()
        else:
            self._up.after(place.read)
        self._up.after(place.written)
        self._up.after(self._written.get(layer, PAST))
        for start, stop in self._ranges[layer](missing):
            self._up.copy(place.buffer_n[start:stop], self._hosts[layer][start:stop])
        place.arrived, place.experts = self._up.mark(), place.experts | missing

    def get(self, layer: int, experts: frozenset[int]) -> torch.Tensor:
        """(n,) of a layer, for what the current stream does next; more than what is asked for may be stale."""
        self.prefetch(layer, experts)
        place = self._places[layer]
        if place.arrived is not PAST:
            self._up.wait(place.arrived)
            place.arrived = PAST
        place.read = None
        return place.buffer_n[: len(self._hosts[layer])]

    def release(self, layer: int) -> None:
        """The current stream has done with what it got; it may get it again."""
        self._places[layer].read = self._up.now()

    def overwrite(self, layer: int, experts: frozenset[int]) -> torch.Tensor:
        """(n,) to be written by the current stream, which makes it the content."""
        place = self._claim(layer)
        self._up.wait(place.arrived)
        self._up.wait(place.written)
        place.arrived, place.experts, place.read = PAST, experts, None
        return place.buffer_n[: len(self._hosts[layer])]

    def write_back(self, layer: int, start: int, stop: int, down: Lane) -> None:
        """Copy a range to the host, after what is queued on the current stream."""
        place = self._places[layer]
        down.after_compute()
        down.copy(self._hosts[layer][start:stop], place.buffer_n[start:stop])
        place.written = self._written[layer] = down.mark()
        place.read = PAST

    def forget(self) -> None:
        """The host's tensors have changed."""
        for place in self._places.values():
            place.experts = frozenset()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        return tensor.untyped_storage().data_ptr() == self._pointer

    def _claim(self, layer: int) -> _Place:
        place = self._places.pop(layer, None)
        if place is None and self._free:
            place = self._free.pop()
        elif place is None:
            place = self._places.pop(next(iter(self._places)))
            place.experts = frozenset()
        self._places[layer] = place
        return place
