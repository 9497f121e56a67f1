"""The truth of `qk_norm_rope`, in plain PyTorch, fp32 inside.

Letters: B batch, T tokens, H query heads, G key heads, d head width; tables are (T, d/2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["Rotated", "qk_norm_rope", "rotate"]


class Rotated(NamedTuple):
    q_BTHd: torch.Tensor
    k_BTGd: torch.Tensor


def rotate(x_BTHd: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of every head, in fp32; shape and dtype are kept."""
    cos, sin = cos_Td[:, None, :], sin_Td[:, None, :]
    first, second = x_BTHd.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHd.dtype)


def qk_norm_rope(
    q_BTHd: torch.Tensor,
    k_BTGd: torch.Tensor,
    q_weight_d: torch.Tensor | None,
    k_weight_d: torch.Tensor | None,
    cos_Td: torch.Tensor,
    sin_Td: torch.Tensor,
    eps: float,
) -> Rotated:
    """Normalise queries and keys head by head, then give them their rotary positions.

    Args:
        q_BTHd, k_BTGd: (B, T, H, d) and (B, T, G, d), one float dtype; d is even.
        q_weight_d, k_weight_d: (d,) weights of the RMSNorm of a head, or both None: rotation only.
        cos_Td, sin_Td: (T, d/2) fp32, of the angles; pair i is (x_i, x_{i + d/2}).
        eps: of the norm, above 0.

    Source: RMSNorm of queries and keys, arXiv 2302.05442; rotary positions, Su et al. 2021 (arXiv 2104.09864), Eq. 34.
    """
    if q_weight_d is not None and k_weight_d is not None:
        q_BTHd = F.rms_norm(q_BTHd, (q_BTHd.shape[-1],), q_weight_d, eps)
        k_BTGd = F.rms_norm(k_BTGd, (k_BTGd.shape[-1],), k_weight_d, eps)
    return Rotated(rotate(q_BTHd, cos_Td, sin_Td), rotate(k_BTGd, cos_Td, sin_Td))
