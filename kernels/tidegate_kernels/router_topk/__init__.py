"""Top-k routing and its statistics in one operation: scores, biased selection, weights, and sums of each sequence.

Letters: N = B T rows, B sequences, T tokens, E experts, K chosen experts.
"""

from __future__ import annotations

from typing import Any

import torch

from tidegate_kernels.choice import takes_triton
from tidegate_kernels.router_topk import reference
from tidegate_kernels.router_topk.reference import SCORES, RoutedTopK, router_signals
from tidegate_kernels.tiles import MOST_PROGRAMS

__all__ = ["SCORES", "RoutedTopK", "router_signals", "router_topk"]

_MOST_EXPERTS = 1024
_MOST_CHOSEN = 32


def router_topk(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_BT: torch.Tensor,
    *,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    signals: bool,
) -> RoutedTopK:
    """Choose, weigh and count experts; see the reference for arguments and sources.

    Of experts with equal biased scores the kernel takes the lowest, the reference any.
    """
    E = logits_NE.shape[1]
    fits = logits_NE.dtype == torch.float32 and E <= _MOST_EXPERTS and top_k <= min(E, _MOST_CHOSEN)
    fits = fits and counted_BT.shape[0] <= MOST_PROGRAMS
    if not takes_triton(logits_NE, fits=fits):
        return reference.router_topk(
            logits_NE,
            bias_E,
            counted_BT,
            top_k=top_k,
            score=score,
            renormalize=renormalize,
            scale=scale,
            signals=signals,
        )
    routed = RoutedTopK(*_router_topk(logits_NE, bias_E, counted_BT, top_k, score, renormalize, scale, signals))
    return routed if signals else routed._replace(signals_B3=None)


@torch.library.custom_op("tidegate::router_topk", mutates_args=())
def _router_topk(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_BT: torch.Tensor,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    signals: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from tidegate_kernels.router_topk import triton

    return triton.forward(logits_NE, bias_E, counted_BT, top_k, score, renormalize, scale, signals)


@_router_topk.register_fake
def _(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_BT: torch.Tensor,
    top_k: int,
    score: str,
    renormalize: bool,
    scale: float,
    signals: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (N, E), B = logits_NE.shape, counted_BT.shape[0]
    experts_NK = logits_NE.new_empty(N, top_k, dtype=torch.int64)
    weights_NK, counts_BE, prob_sums_BE, z_sums_B = map(logits_NE.new_empty, ((N, top_k), (B, E), (B, E), (B,)))
    return weights_NK, experts_NK, counts_BE, prob_sums_BE, z_sums_B, logits_NE.new_empty(B if signals else 0, 3)


@torch.library.custom_op("tidegate::router_topk_backward", mutates_args=())
def _router_topk_backward(
    dweights_NK: torch.Tensor,
    dprob_sums_BE: torch.Tensor,
    dz_sums_B: torch.Tensor,
    logits_NE: torch.Tensor,
    experts_NK: torch.Tensor,
    counted_BT: torch.Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    from tidegate_kernels.router_topk import triton

    return triton.backward(
        dweights_NK, dprob_sums_BE, dz_sums_B, logits_NE, experts_NK, counted_BT, score, renormalize, scale
    )


@_router_topk_backward.register_fake
def _(
    dweights_NK: torch.Tensor,
    dprob_sums_BE: torch.Tensor,
    dz_sums_B: torch.Tensor,
    logits_NE: torch.Tensor,
    experts_NK: torch.Tensor,
    counted_BT: torch.Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    return logits_NE.new_empty(logits_NE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_NE, _, counted_BT, _, ctx.score, ctx.renormalize, ctx.scale, _ = inputs
    _, experts_NK, counts_BE, _, _, signals_B3 = output
    ctx.save_for_backward(logits_NE, experts_NK, counted_BT)
    ctx.mark_non_differentiable(experts_NK, counts_BE, signals_B3)
    ctx.set_materialize_grads(False)  # else zeros for the three are a launch each


def _differentiate(
    ctx: Any,
    dweights_NK: torch.Tensor | None,
    dexperts_NK: None,
    dcounts_BE: None,
    dprob_sums_BE: torch.Tensor | None,
    dz_sums_B: torch.Tensor | None,
    dsignals_B3: None,
) -> tuple[torch.Tensor | None, ...]:
    logits_NE, experts_NK, counted_BT = ctx.saved_tensors
    B, E = counted_BT.shape[0], logits_NE.shape[1]
    given = ((dweights_NK, experts_NK.shape), (dprob_sums_BE, (B, E)), (dz_sums_B, (B,)))
    gradients = (logits_NE.new_zeros(shape) if g is None else g for g, shape in given)
    dlogits_NE = _router_topk_backward(
        *gradients, logits_NE, experts_NK, counted_BT, ctx.score, ctx.renormalize, ctx.scale
    )
    return dlogits_NE, None, None, None, None, None, None, None


_router_topk.register_autograd(_differentiate, setup_context=_save)
