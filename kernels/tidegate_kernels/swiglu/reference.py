"""The truth of `swiglu`, in plain PyTorch.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["swiglu"]


def swiglu(gate_NF: torch.Tensor, up_NF: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up`, times a weight of the row.

    Args:
        gate_NF, up_NF: (..., F), one shape and float dtype.
        weights_N: (...) fp32, what routing gives each row, or None for 1.

    Returns:
        Shape and dtype of `gate_NF`.

    Source: Shazeer 2020 (arXiv 2002.05202), Eq. 5.
    """
    activated_NF = F.silu(gate_NF) * up_NF
    return activated_NF if weights_N is None else (activated_NF * weights_N.unsqueeze(-1)).to(gate_NF.dtype)
