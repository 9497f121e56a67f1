"""Initial values that do not depend on the world size.

Every tensor draws from its own generator, seeded by (run seed, parameter name, row). A rank that holds experts
8..15 of 64 therefore draws exactly what a single process draws for those rows, and adding a parameter changes no
other. Values are the same on any number of ranks of one device type; CPU and CUDA generators differ.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

__all__ = ["Draw"]


class Draw(NamedTuple):
    """Draws initial values for the parameters of one module."""

    seed: int
    path: str
    """Qualified name of the module, e.g. `blocks.3.attention.wq`."""

    def normal_(self, tensor: torch.Tensor, std: float, name: str, row: int = 0) -> None:
        """Fill `tensor` in place with N(0, std^2), a function of (seed, path, name, row, shape) alone."""
        digest = hashlib.sha256(f"{self.seed}/{self.path}.{name}/{row}".encode()).digest()
        generator = torch.Generator(device=tensor.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        with torch.no_grad():
            tensor.normal_(0.0, std, generator=generator)
