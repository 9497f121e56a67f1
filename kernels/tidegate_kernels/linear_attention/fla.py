"""Linear attention through the kernels of flash-linear-attention, on a CUDA device that has it: `fla-core`, an extra.

They have computed wrong gradients on some pairs of compiler and device, so each is put to the test before its first use
in a process: outputs, states and every gradient beside our own chunks. One that raises or differs is not used, with a
warning that says so: Gated DeltaNet then goes through Kimi Delta Attention, whose equal decays are the same maths, and
all else through the chunks. Of each kernel's first use most is fla's tuning: minutes, kept in Triton's cache.

Letters: B batch, T tokens, H heads, K key width, V value width, k decays a head (K or 1), S documents of the batch.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import Literal

import torch
from packaging.version import Version

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.gated_attention.documents import Documents
from tidegate_kernels.linear_attention import chunked
from tidegate_kernels.linear_attention.reference import LinearOutput

__all__ = ["Kernel", "kernel_for", "linear_attention"]

Kernel = Literal["gla", "kda", "gated_delta_rule"]

_WIDEST = 256
_CLOSE = 1e-2
"""Norm of a difference over the norm of what it is compared with: bf16 leaves 2e-3 to 5e-3, a wrong term far more."""


def kernel_for(v_BTHV: torch.Tensor, key_dim: int, *, delta: bool, by_head: bool) -> Kernel | None:
    """The kernel for an input; None where the chunks run: without CUDA or fla, in fp32, or where the test failed."""
    if v_BTHV.dtype != torch.bfloat16 or not v_BTHV.is_cuda or max(key_dim, v_BTHV.shape[-1]) > _WIDEST:
        return None
    if not (_installed() and takes_triton(v_BTHV)):
        return None
    choices: tuple[Kernel, ...] = (("gated_delta_rule", "kda") if by_head else ("kda",)) if delta else ("gla",)
    return next((kernel for kernel in choices if _passes(kernel, key_dim, v_BTHV.shape[-1], v_BTHV.device)), None)


@lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def _operation(kernel: Kernel) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if kernel == "gla":
        from fla.ops.gla import chunk_gla

        return chunk_gla
    if kernel == "kda":
        from fla.ops.kda import chunk_kda

        return chunk_kda
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule


def linear_attention(
    kernel: Kernel,
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    log_decay_BTHk: torch.Tensor,
    beta_BTH: torch.Tensor | None = None,
    documents: Documents | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> LinearOutput:
    """See `reference.linear_attention`; with documents all of a batch is one row of S documents to the kernel."""
    B, T = q_BTHK.shape[:2]
    decay = log_decay_BTHk.float()
    decay = decay.squeeze(-1) if kernel == "gated_delta_rule" else decay.expand_as(k_BTHK)
    given = [q_BTHK, k_BTHK, v_BTHV, decay] + ([] if beta_BTH is None else [beta_BTH])
    state = None if state_BHKV is None else state_BHKV.float()
    if documents is None:
        y, end = _operation(kernel)(*given, initial_state=state, output_final_state=True)
        return LinearOutput(y, end)
    begins_S1 = documents.begins
    first_B = torch.searchsorted(begins_S1, T * torch.arange(B + 1, device=begins_S1.device))
    if state is not None:
        state = state.new_zeros(len(begins_S1) - 1, *state.shape[1:]).index_copy(0, first_B[:-1], state)
    y, ends = _operation(kernel)(
        *(x.flatten(0, 1)[None] for x in given), initial_state=state, output_final_state=True, cu_seqlens=begins_S1
    )
    return LinearOutput(y.view(v_BTHV.shape), ends[first_B[1:] - 1])


def _refuses_hopper(device: torch.device) -> bool:
    """What fla raises on in the backward pass alone, after minutes of tuning the forward pass."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if not hopper or importlib.util.find_spec("tilelang") is not None:
        return False
    return Version("3.4") <= Version(metadata.version("triton")) < Version("3.7.1")


@lru_cache
def _passes(kernel: Kernel, K: int, V: int, device: torch.device) -> bool:
    """Whether a kernel computes what the chunks do, which also tunes it at a size that is not tiny."""
    if kernel == "gated_delta_rule" and _refuses_hopper(device):
        warnings.warn(
            f"fla's {kernel} is not used here: its backward pass refuses Hopper with Triton "
            f"{metadata.version('triton')} (from 3.7.1 on it runs); Gated DeltaNet goes through its kda",
            stacklevel=2,
        )
        return False
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    B, T, H = 2, 2000, 16
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    decay = -0.1 * torch.rand(B, T, H, 1 if kernel == "gated_delta_rule" else K, device=device, generator=generator)
    decay[:, ::50] *= 50
    beta = None
    if kernel != "gla":
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        beta = torch.rand(B, T, H, device=device, generator=generator).bfloat16()
    inputs = [q.bfloat16(), k.bfloat16(), v.bfloat16(), decay, beta, normal(B, H, K, V)]
    documents = Documents((torch.rand(B, T, device=device, generator=generator) < 0.01).long().cumsum(dim=1))
    upstream = normal(B, T, H, V).bfloat16(), normal(B, H, K, V)

    def results(operation: Callable[..., LinearOutput]) -> list[torch.Tensor]:
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
        output = operation(*leaves[:5], documents, leaves[5])
        torch.autograd.backward(output, upstream)
        gradients = [leaf.grad for leaf in leaves if leaf is not None]
        assert all(gradient is not None for gradient in gradients)
        return [*(x.detach() for x in output), *(gradient for gradient in gradients if gradient is not None)]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it is made of
            found = results(lambda *arguments: linear_attention(kernel, *arguments))
    except Exception as error:  # whatever it raises, this pair does not run it
        warnings.warn(f"fla's {kernel} is not used here: {type(error).__name__}: {str(error)[:300]}", stacklevel=2)
        return False
    names = ["output", "state", *(f"gradient of {name}" for name in ("q", "k", "v", "decay", "beta", "state"))]
    if beta is None:
        names.remove("gradient of beta")
    for name, mine, truth in zip(names, found, results(chunked.linear_attention), strict=True):
        error_norm = float((mine.float() - truth.float()).norm() / truth.float().norm())
        if not error_norm <= _CLOSE:  # nor NaN
            where = f"key width {K}, value width {V}, {torch.cuda.get_device_name(device)}"
            problem = f"its {name} differs by {error_norm:.1e} from plain PyTorch ({where})"
            warnings.warn(f"fla's {kernel} is not used here: {problem}", stacklevel=2)
            return False
    return True
