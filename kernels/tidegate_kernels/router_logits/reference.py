"""The truth of `router_logits`, in plain PyTorch.

Letters: N rows, D width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["router_logits"]


def router_logits(x_ND: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    """(N, E) `x w^T` in fp32, or in fp64 for fp64. bf16 logits swap near-equal experts from one run to the next.

    Args:
        x_ND: (N, D).
        w_ED: (E, D), same dtype.
    """
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return F.linear(x_ND.to(dtype), w_ED.to(dtype))
