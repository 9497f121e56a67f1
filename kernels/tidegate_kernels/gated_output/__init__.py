"""Gate a tensor of attention by activated scores: `y * act(z)` or `y + act(z)`."""

from tidegate_kernels.gated_output.reference import ACTIVATIONS, gated_output

__all__ = ["ACTIVATIONS", "gated_output"]
