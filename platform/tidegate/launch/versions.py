"""Whether a job runs on another machine with the versions that it would have here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from packaging.version import Version

__all__ = ["mismatches"]


def mismatches(
    here: Mapping[str, str], python_here: str, there: Mapping[str, str | None], python_there: str
) -> Iterator[str]:
    """In words. Of Python two numbers count, of packages what stands before `+`: builds for CUDA and CPU compare."""
    if Version(python_here).release[:2] != Version(python_there).release[:2]:
        yield f"python {python_there}, here {python_here}"
    for name, version in here.items():
        found = there.get(name)
        if found is None:
            yield f"no {name}, here {version}"
        elif Version(found).public != Version(version).public:
            yield f"{name} {found}, here {version}"
