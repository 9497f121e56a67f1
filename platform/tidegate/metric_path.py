"""What a metric's name says: which family of docs/metrics.md it belongs to, and of which layer, expert or domain it is.

`moe/3/maxvio` is `moe/<layer>/maxvio` of layer 3. All that reads metrics by place goes through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

__all__ = ["MetricPath", "parse_metric", "without_details"]

_PATHS = (
    "moe/<layer>/load/<expert>",
    "moe/<layer>/<domain>/<name>",
    "moe/<layer>/<name>",
    "attention/<block>/head/<head>/<name>",
    "attention/<block>/gate/<bin>",
    "attention/<block>/<name>",
    "hidden/<block>/<name>",
    "val/<domain>/<name>",
    "system/<node>/<name>",
)


class MetricPath(NamedTuple):
    """A metric's name, taken apart."""

    pattern: str
    """As docs/metrics.md writes it."""
    place: dict[str, str]
    """Of what the metric is: `layer`, `expert`, `block`, `head`, `bin`, `node` (numbers from 0), `domain`; as
    written in the name."""

    @property
    def is_detail(self) -> bool:
        """Of one expert, head, bin or domain of a layer: most names of a run, too many for every record."""
        return len(self.place) > 1


def _expression(path: str) -> re.Pattern[str]:
    path = re.sub(r"<(domain|name)>", r"(?P<\1>[^/]+)", path)
    return re.compile(re.sub(r"(?<!\?P)<(\w+)>", r"(?P<\1>\\d+)", path))


_EXPRESSIONS = tuple(map(_expression, _PATHS))


@lru_cache(maxsize=100_000)  # a run has the same names at every record
def parse_metric(name: str) -> MetricPath:
    """Take a metric's name apart; one of a family without a place is its own pattern."""
    for path, expression in zip(_PATHS, _EXPRESSIONS, strict=True):
        found = expression.fullmatch(name)
        if found:
            place = found.groupdict()
            last = place.pop("name", None)
            return MetricPath(path if last is None else path.replace("<name>", last), place)
    return MetricPath(name, {})


def without_details(metrics: Mapping[str, float]) -> dict[str, float]:
    """What is recorded every time."""
    return {name: value for name, value in metrics.items() if not parse_metric(name).is_detail}
