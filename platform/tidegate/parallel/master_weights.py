"""Changing weights from outside the optimizer: what is in use is a copy, and DeepSpeed keeps the fp32 truth elsewhere.

Under ZeRO 1 and 2 it is spread over the ranks; at ZeRO 0 in bf16 it is a list beside the weights; at ZeRO 0 in fp32
the weights are the truth themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

__all__ = ["scale_rows"]


@torch.no_grad()
def scale_rows(optimizer: Any, weight: torch.nn.Parameter, factors_R: torch.Tensor) -> None:
    """Multiply the rows of a weight, in place: the fp32 truth, and from it what is in use.

    Every rank calls it with the same factors. Under ZeRO the rows travel once, as fp32.

    Args:
        optimizer: DeepSpeed's, of the engine that holds the weight.
        weight: (R, ...), the same on every rank (not of an expert).
        factors_R: (R,) fp32.
    """
    by_row = factors_R.view(-1, *[1] * (weight.ndim - 1))
    if hasattr(weight, "_hp_mapping"):
        master = safe_get_full_fp32_param(weight) * by_row
        safe_set_full_fp32_param(weight, master)
    elif hasattr(optimizer, "fp32_groups"):
        pairs = zip(_flat(optimizer.fp16_groups), _flat(optimizer.fp32_groups), strict=True)
        master = next(full for low, full in pairs if low is weight).mul_(by_row)
    else:
        master = weight * by_row
    weight.copy_(master)


def _flat(groups: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for group in groups for tensor in group]
