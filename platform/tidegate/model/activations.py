"""Non-linearities of the feed-forward, between its first and its last matrix.

Gated ones multiply an activated product with a second one, `act(W1 x) * (W3 x)`, and so have three matrices:
    swiglu      silu                                            Shazeer 2020 (arXiv 2002.05202)
    geglu       gelu, exact
The others have two, so at equal parameters they are half as wide again:
    relu2       relu(h)^2                                       Primer (arXiv 2109.08668)
    poly_relu   c0 + c1 r + c2 r^2 + c3 r^3, r = relu(h)        PolyCom (arXiv 2411.03884)
    poly_norm   c0 + sum_i ci h^i / rms(h^i), i = 1..3          PolyCom; rms over the hidden axis, eps 1e-6
with learned c, at first c0 = 0 and the others 1/3, as in the paper. Each routed expert has its own.

Letters: N rows, F hidden width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from tidegate_kernels.poly_norm import poly_norm
from tidegate_kernels.swiglu import swiglu

__all__ = [
    "NUM_COEFFICIENTS",
    "ActivationName",
    "activate",
    "has_coefficients",
    "init_coefficients",
    "is_gated",
    "num_matrices",
]

ActivationName = Literal["swiglu", "geglu", "relu2", "poly_norm", "poly_relu"]

NUM_COEFFICIENTS = 4


def is_gated(name: ActivationName) -> bool:
    return name in ("swiglu", "geglu")


def has_coefficients(name: ActivationName) -> bool:
    return name in ("poly_norm", "poly_relu")


def num_matrices(name: ActivationName) -> int:
    """Of a feed-forward with this activation."""
    return 3 if is_gated(name) else 2


def init_coefficients(coefficients: torch.Tensor) -> None:
    """Fill (..., 4) in place."""
    with torch.no_grad():
        coefficients.fill_(1 / 3)
        coefficients[..., 0] = 0


def activate(
    name: ActivationName,
    hidden_NF: torch.Tensor,
    up_NF: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply an activation.

    Args:
        name: which.
        hidden_NF: (..., F), the first product.
        up_NF: the second product, of gated activations only.
        coefficients: (4,), or (N, 4) with those of each row; of polynomials only.

    Returns:
        Shape and dtype of `hidden_NF`.
    """
    if up_NF is not None:
        return swiglu(hidden_NF, up_NF) if name == "swiglu" else F.gelu(hidden_NF) * up_NF
    if coefficients is None:
        return F.relu(hidden_NF).square()
    if name == "poly_norm":
        return poly_norm(hidden_NF, coefficients)
    # Cubes: far out of what bf16 resolves.
    wide = torch.promote_types(hidden_NF.dtype, torch.float32)
    c0, c1, c2, c3 = (c.unsqueeze(-1) for c in coefficients.to(wide).unbind(-1))
    x = F.relu(hidden_NF.to(wide))
    return (c0 + x * (c1 + x * (c2 + x * c3))).to(hidden_NF.dtype)
