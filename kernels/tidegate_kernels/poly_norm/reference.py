"""The truth of `poly_norm`, in plain PyTorch, fp32 inside.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

import torch

__all__ = ["EPS", "poly_norm"]

EPS = 1e-6
"""Of the three norms, as in the paper's code."""


def poly_norm(x_NF: torch.Tensor, coefficients: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """`c0 + sum_i ci x^i / rms(x^i)`, i = 1..3, rms over the row, times a weight of the row.

    Args:
        x_NF: (..., F), any float dtype.
        coefficients: (4,), or (..., 4) with those of each row; any float dtype.
        weights_N: (...) fp32, what routing gives each row, or None for 1.

    Returns:
        Shape and dtype of `x_NF`.

    Source: PolyCom (arXiv 2411.03884), PolyNorm.
    """
    # Cubes, and their squares in the norm: far out of what bf16 resolves.
    wide = torch.promote_types(x_NF.dtype, torch.float32)
    c0, c1, c2, c3 = (c.unsqueeze(-1) for c in coefficients.to(wide).unbind(-1))
    x = x_NF.to(wide)
    square = x.square()
    out = c0 + c1 * _normalised(x) + c2 * _normalised(square) + c3 * _normalised(square * x)
    return (out if weights_N is None else out * weights_N.unsqueeze(-1)).to(x_NF.dtype)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)
