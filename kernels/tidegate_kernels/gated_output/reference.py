"""The truth of `gated_output`, in plain PyTorch, fp32 inside.

Letters: B batch, T tokens, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["ACTIVATIONS", "gated_output"]


def _ns_sigmoid(z: torch.Tensor) -> torch.Tensor:
    """The non-sparse sigmoid 0.5 + 0.5 sigmoid(z), in [0.5, 1]: non-linear, but it cannot close."""
    return 0.5 + 0.5 * torch.sigmoid(z)


def _identity(z: torch.Tensor) -> torch.Tensor:
    return z


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "ns_sigmoid": _ns_sigmoid,
    "identity": _identity,
}


def gated_output(
    y_BTHd: torch.Tensor, scores_BTHs: torch.Tensor, *, activation: str, form: str, shared: bool
) -> torch.Tensor:
    """Modulate `y` by activated scores.

    Args:
        y_BTHd: (..., H, d), the tensor to gate, any float dtype.
        scores_BTHs: (..., H, d) for elementwise scores or (..., H, 1) for one score a head, before the activation.
        activation: a key of `ACTIVATIONS`.
        form: "multiplicative" or "additive".
        shared: average the activated scores over heads, so that every head gets the same gate.

    Returns:
        Shape and dtype of `y_BTHd`.

    Source: Qiu et al. 2025 (arXiv 2505.06708), Eq. 5 and 9, section 3.2.1.
    """
    gate = ACTIVATIONS[activation](scores_BTHs.float())
    if shared:
        gate = gate.mean(dim=-2, keepdim=True)
    y = y_BTHd.float()
    return (y * gate if form == "multiplicative" else y + gate).to(y_BTHd.dtype)
