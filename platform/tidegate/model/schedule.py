"""Which token mixer each block has, written as `[3 x kda, 1 x attention] x 6`."""

from __future__ import annotations

import re

__all__ = ["ATTENTION", "expand", "repeated"]

ATTENTION = "attention"
"""The name of `model.attention` in a schedule."""

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][A-Za-z0-9_]*)|([\[\],]))")
_MOST_LAYERS = 4096  # no model has more; a typing error is not to fill the memory


def repeated(schedule: str, num_layers: int) -> tuple[str, ...]:
    """The name of each block's mixer: the schedule as it stands, or as often as it fits.

    Raises:
        ValueError: it is no schedule, or of a length that does not divide the number of layers.
    """
    names = expand(schedule)
    if num_layers % len(names):
        raise ValueError(
            f"layers={schedule!r} are {len(names)} layers, which do not go into num_layers={num_layers}; use as many, "
            "or a pattern that repeats"
        )
    return names * (num_layers // len(names))


def expand(schedule: str) -> tuple[str, ...]:
    """The names that a schedule stands for: items in a row, each a name or a list in brackets, with `n x` before it or
    `x n` behind it.

    Raises:
        ValueError: it is no schedule.
    """
    return _Parser(schedule).whole()


class _Parser:
    def __init__(self, schedule: str) -> None:
        self._schedule, self._place, self._tokens = schedule, 0, list[str]()
        end = 0
        while found := _TOKEN.match(schedule, end):
            self._tokens.append(found[0].strip())
            end = found.end()
        if rest := schedule[end:].strip():
            raise self._wrong(f"{rest[:20]!r} is not part of it")

    def whole(self) -> tuple[str, ...]:
        names = self._items(depth=0)
        if self._place < len(self._tokens):
            raise self._wrong(f"{self._tokens[self._place]!r} is not expected there")
        return names

    def _items(self, depth: int) -> tuple[str, ...]:
        names = self._item(depth)
        while self._take(","):
            names = self._short_enough(names + self._item(depth))
        return names

    def _item(self, depth: int) -> tuple[str, ...]:
        times = 1
        if self._next().isdecimal():
            times = self._number()
            if not self._take("x"):
                raise self._wrong(f"'x' is missing behind {times}")
        if self._take("["):
            if depth == 8:
                raise self._wrong("it has more than 8 brackets in each other")
            names = self._items(depth + 1)
            if not self._take("]"):
                raise self._wrong("']' is missing")
        elif self._next() == "x" or not self._next().isidentifier():
            raise self._wrong(f"a name or '[' is missing before {self._next()!r}" if self._next() else "it ends early")
        else:
            names = (self._tokens[self._place],)
            self._place += 1
        if self._take("x"):
            times *= self._number()
        return self._short_enough(names, times) * times

    def _number(self) -> int:
        token = self._next()
        if not token.isdecimal() or not 1 <= len(token) <= 5 or int(token) == 0:
            raise self._wrong(f"a number of at least 1 is missing{f' before {token!r}' if token else ''}")
        self._place += 1
        return int(token)

    def _short_enough(self, names: tuple[str, ...], times: int = 1) -> tuple[str, ...]:
        if len(names) * times > _MOST_LAYERS:
            raise self._wrong(f"that is more than {_MOST_LAYERS:,} layers")
        return names

    def _next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self, token: str) -> bool:
        taken = self._next() == token
        self._place += taken
        return taken

    def _wrong(self, why: str) -> ValueError:
        return ValueError(f"layers={self._schedule!r}: {why}; write it as '[3 x kda, 1 x attention] x 6'")
