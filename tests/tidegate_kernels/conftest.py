"""Uninitialised memory is poisoned, and every test gets the same random numbers on one thread."""

import pytest


@pytest.fixture(autouse=True)
def _numerics(poisoned_memory: None, seeded_single_thread: None) -> None:
    pass
