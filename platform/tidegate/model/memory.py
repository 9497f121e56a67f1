"""Bytes that a forward and a backward pass hold, found by running them on tensors without values.

On `meta` every operation says which tensors it makes and autograd keeps what it would keep on a GPU, in a second and
without memory. So no layer is described twice: what a block saves is what its operations save. What is written down
here is what such a run cannot see: buffers inside of our operations, and decisions that depend on values.

Letters: N rows, A assignments, D width, F expert width, E experts, K chosen experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, MoEFactory
from tidegate.model.moe import MoE, MoEConfig
from tidegate_kernels.choice import Kernels, chosen

__all__ = ["LiveBytes", "PassMemory", "inner_bytes", "model_on_meta", "pass_memory"]


class PassMemory(NamedTuple):
    """Bytes on top of the weights, of one micro-batch."""

    saved: int
    """Held for the backward pass when the forward pass has ended."""
    forward: int
    """At the largest moment of the forward pass and the loss."""
    backward: int
    """At the largest moment of the backward pass; of gradients of weights only the one that is being made."""


def model_on_meta(
    config: ModelConfig, dtype: torch.dtype, *, moe: MoEFactory = MoE, recompute: bool = False
) -> Decoder:
    """The model without values, in the dtype of its weights in use."""
    with torch.device("meta"):
        return Decoder(config, moe, recompute).to(dtype)


def pass_memory(
    model: Decoder, *, micro_batch: int, sequence_length: int, isolate: bool, kernels: Kernels
) -> PassMemory:
    """What a training pass of a micro-batch holds.

    Args:
        model: on `meta`.
        micro_batch, sequence_length: of the batch.
        isolate: whether attention stays inside documents.
        kernels: `auto` stands for those of a GPU.
    """
    tokens_BT = torch.empty(micro_batch, sequence_length, dtype=torch.int64, device="meta")
    counted_BT = torch.empty_like(tokens_BT, dtype=torch.bool)
    documents_BT = torch.empty_like(tokens_BT, dtype=torch.int32) if isolate else None
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_let_go)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with chosen(kernels), _Expected(model.config, tokens_BT.numel()), live:
        output = model(tokens_BT, tokens_BT, counted_BT, documents_BT, clock=Clock(1, 1, 0))
        saved, forward = live.now, live.peak
        live.peak = live.now
        loss = output.nll
        if output.stats is not None:
            loss = loss + output.stats.prob_sums_BE.sum() + output.stats.z_sums_B.sum()
            loss = loss + output.stats.penalty_sums_B.sum()
        if output.unit_penalty is not None:
            loss = loss + output.unit_penalty
        loss.backward()
    return PassMemory(saved, forward, live.peak)


def _let_go(parameter: torch.Tensor) -> None:
    """How long gradients stay is the optimizer's business (`parallel/memory.py`)."""
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and that are still held, on any device.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._held = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see((leaf._values() if leaf.is_sparse else leaf).untyped_storage())
        self.peak = max(self.peak, self.now + inner_bytes(func, args))
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            self._held.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


class _Expected(TorchDispatchMode):
    """Answers what only values could: how many assignments a ragged router makes, how many slices uneven experts take.

    A ragged router makes the K a row that its controller holds, or all E in its dense phase.
    """

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self._assignments = self._slices = rows
        if isinstance(config.ffn, MoEConfig):
            ffn = config.ffn
            self._assignments = rows * (ffn.num_experts if ffn.capabilities.dense_phase else ffn.top_k)
            self._slices = round(self._assignments * ffn.num_slices / ffn.num_experts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(self._assignments, args[0].ndim, dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self._slices
        return func(*args, **(kwargs or {}))


# --- buffers inside of operations --------------------------------------------------------------------------------


def inner_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Most bytes that one of our operations holds beyond what it is given and what it returns."""
    count = _INNER.get(func._schema.name)
    return 0 if count is None else count(*args)


def _loss(x_ND: torch.Tensor, w_VD: torch.Tensor, *rest: Any) -> int:
    """The logits of a chunk of rows, and the head padded to whole tiles."""
    rows = rest[5]
    padded = -(-len(w_VD) // 64) * 64
    head = padded * w_VD.shape[1] if padded > len(w_VD) else 0
    return (min(rows, len(x_ND)) * padded + head) * x_ND.element_size()


def _attention_backward(
    g: Any, q: Any, k: Any, v: Any, y: torch.Tensor, lse: torch.Tensor, scores: Any, *_: Any
) -> int:
    """A sum of each row and, behind a gate, the gradient of what it gates."""
    return lse.nbytes + (0 if scores is None else y.nbytes)


def _experts(
    x: torch.Tensor, weights: Any, slot: torch.Tensor, ends: Any, starts: Any, per_row: int, w1: Any, w3: Any, w2: Any,
    keep_rows: bool,
) -> int:  # fmt: skip
    """Activations, outputs and weights in expert order."""
    A = len(slot)
    return _wide(x, w1, A) + A * (x.shape[1] * x.element_size() + 4)


def _experts_backward(
    g: Any, x: torch.Tensor, weights: Any, slot: torch.Tensor, ends: Any, starts: Any, k: int, w1: Any, *rest: Any
) -> int:
    """The largest of the moments of the backward pass, less what it returns."""
    A, kept_AD = len(slot), rest[-1]
    hidden_AF, rows_AD = _wide(x, w1, A), A * x.shape[1] * x.element_size()
    gradients = 3 * w1.nbytes
    again_AD = rows_AD if kept_AD is None else 0
    moments = (
        rows_AD + 4 * A + 4 * hidden_AF,  # in the backward pass of the activation
        2 * hidden_AF + max(again_AD + 4 * A, rows_AD) + gradients,
        2 * hidden_AF + rows_AD + x.nbytes + gradients,
    )
    return max(0, max(moments) - x.nbytes - gradients)


def _wide(x: torch.Tensor, w1_EFD: torch.Tensor, rows: int) -> int:
    return rows * w1_EFD.shape[1] * x.element_size()


def _router_backward(g_NE: torch.Tensor, *_: Any) -> int:
    """The gradient as two bf16 numbers each."""
    return g_NE.nbytes


_INNER: dict[str, Callable[..., int]] = {
    "tidegate::linear_cross_entropy": _loss,
    "tidegate::gated_attention_backward": _attention_backward,
    "tidegate::moe_experts": _experts,
    "tidegate::moe_experts_backward": _experts_backward,
    "tidegate::router_logits_backward": _router_backward,
}
