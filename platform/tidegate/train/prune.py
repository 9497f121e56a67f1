"""The `prune:` section of a job: a chain of runs that looks for a sparse subnetwork which trains as well.

It belongs to the job file so that a chain is one file; `tidegate train` does not look at it.
"""

from __future__ import annotations

from pydantic import Field

from tidegate.config import Config
from tidegate.model.masks import Prunable

__all__ = ["PruneConfig"]


class PruneConfig(Config):
    """Iterative magnitude pruning with rewinding (Frankle et al. 2020, arXiv 1912.05671)."""

    over: tuple[Prunable, ...] = Field(default=("attention", "ffn", "experts"), min_length=1)
    """Matrices that lose weights: of queries, keys, values and outputs; of a dense feed-forward or the shared experts;
    of routed experts. They are ranked together."""
    keep: float = Field(default=0.8, gt=0, lt=1)
    """Share of the weights left that a round keeps."""
    rounds: int = Field(default=5, ge=1)
    rewind_tokens: int = Field(ge=0)
    """Every round begins with the dense run's weights, data and schedule after so many tokens; 0 is its beginning."""
    control: bool = True
    """Train the last mask once more, all of it from other initial weights."""

    def kept(self, total: int, round: int) -> int:
        """Of so many weights, those left after a round."""
        return max(1, int(total * self.keep**round + 0.5))
