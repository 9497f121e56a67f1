"""Uninitialised memory is poisoned, and every test gets the same random numbers on one thread."""

from collections.abc import Iterator

import pytest

from tidegate_kernels.choice import Kernels, chosen


@pytest.fixture(autouse=True)
def _numerics(poisoned_memory: None, seeded_single_thread: None) -> None:
    pass


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Both implementations, Triton in the interpreter if there is no GPU."""
    with chosen(request.param):
        yield request.param
