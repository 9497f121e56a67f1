"""How often to save, and what failures cost.

Young, "A first order approximation to the optimum checkpoint interval" (CACM 17, 1974): tau = sqrt(2 delta M). Daly,
"A higher order estimate of the optimum checkpoint interval for restart dumps" (FGCS 22, 2006), equations 37 and 20.

Letters: delta seconds that training stands for a save, M seconds between failures of the whole run, R seconds from a
failure until training goes on, tau seconds of training between saves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Saving", "daly", "lost_share", "saving", "young"]


class Saving(NamedTuple):
    interval_s: float
    """Of training between two saves."""
    lost: float
    """Share of the wall clock that saves and failures are expected to take."""
    stall_s: float
    write_s: float
    """In the background."""
    mtbf_s: float


def young(delta: float, M: float) -> float:
    """The interval to first order; seconds."""
    return math.sqrt(2 * delta * M)


def daly(delta: float, M: float) -> float:
    """The interval to higher order; where a save takes longer than 2 M, M."""
    if delta >= 2 * M:
        return M
    x = delta / (2 * M)
    return young(delta, M) * (1 + math.sqrt(x) / 3 + x / 9) - delta


def lost_share(tau: float, delta: float, M: float, R: float) -> float:
    """1 - (training time) / (wall clock), failures arriving at random (exponentially) and during restarts too."""
    if (tau + delta) / M > 700 or R / M > 700:  # exp overflows: nothing gets done
        return 1.0
    wall = M * math.exp(R / M) * math.expm1((tau + delta) / M)
    return 1 - tau / wall


def saving(stall_s: float, write_s: float, mtbf_s: float, restart_s: float, longest_s: float) -> Saving:
    """The best interval that a save's writing allows.

    Args:
        stall_s: that training stands.
        write_s: until a save is written; the next waits for it.
        mtbf_s: between failures of the run.
        restart_s: after one.
        longest_s: of the run, after which there is nothing to save for.
    """
    interval = min(max(daly(stall_s, mtbf_s), write_s), max(longest_s, write_s))
    return Saving(interval, lost_share(interval, stall_s, mtbf_s, restart_s), stall_s, write_s, mtbf_s)
