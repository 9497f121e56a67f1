"""Secrets out of all that is logged, stored or shown, in one place.

A secret is known by where it stands: between user and host of a URI, or behind a name that says so (`password=`,
`?X-Amz-Signature=`, `"token": ...`, `Bearer ...`). In free text too much is taken rather than too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "is_secret_name", "redact", "redact_command", "redact_values"]

HIDDEN = "***"

_NAME = (
    r"(?:passwor[dt]|passwd|passphrase|pwd|secret|(?<!per_)token|credentials?|signature|\bsig|"
    r"(?:api|access|account|private|secret|signing)[_-]?key(?:[_-]?id)?)"
)
_ENDS_IN_SECRET_NAME = re.compile(rf"{_NAME}\Z", re.IGNORECASE)
# What follows the last @ is the host, as passwords may hold one; host:8080/a@b has a port and no password.
_PASSWORD = re.compile(r"(://[^\s/?#:@]*:)(?!\d+(?:[/?#\s]|\Z))\S*@")
_LONE_TOKEN = re.compile(r"(https?://)[^\s/?#:@]+@", re.IGNORECASE)  # elsewhere a user or, in abfs://, a container
_NAMED = re.compile(
    rf"""((?:{_NAME}["']?\s*=\s*|{_NAME}["']\s*:\s*|(?<![\w.-])[\w-]{{0,40}}{_NAME}:\s+))"""
    r"""(?:(["'])(?:\\.|(?!\2).)*\2|[^\s&]+)""",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"""(\b(?:bearer\s+|authorization["']?\s*[:=]\s*["']?(?:\w+\s+)?))[^\s"']{8,}""", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with `***` in place of every secret; what is redacted already stays as it is."""
    text = _PASSWORD.sub(rf"\1{HIDDEN}@", text)
    text = _LONE_TOKEN.sub(rf"\1{HIDDEN}@", text)
    text = _SCHEME.sub(rf"\1{HIDDEN}", text)
    return _NAMED.sub(lambda found: f"{found[1]}{found[2] or ''}{HIDDEN}{found[2] or ''}", text)


def redact_command(command: Sequence[str]) -> tuple[str, ...]:
    """A command line, argument by argument: behind `name=` of a secret, the whole rest is one."""
    return tuple(map(_argument, command))


def redact_values(value: Any) -> Any:
    """A nest of mappings and lists with the secrets in its strings, and the values of secret names, hidden."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if is_secret_name(key) and item is not None else redact_values(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def is_secret_name(name: Any) -> bool:
    """Whether a field of this name holds a secret: `hub_token`, but not `tokens` or `tokenizer`."""
    return isinstance(name, str) and _ENDS_IN_SECRET_NAME.search(name) is not None


def _argument(text: str) -> str:
    name, equals, _ = text.partition("=")
    return f"{name}={HIDDEN}" if equals and is_secret_name(name) else redact(text)
