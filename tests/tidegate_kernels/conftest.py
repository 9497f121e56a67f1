"""Every test gets the same random numbers.

On a CPU uninitialised memory is poisoned and Triton is interpreted; on a machine with a GPU the same tests run there.
"""

from collections.abc import Iterator

import pytest
import torch

from tidegate_kernels.choice import Kernels, chosen


@pytest.fixture(autouse=True)
def _numerics(request: pytest.FixtureRequest) -> Iterator[None]:
    if not torch.cuda.is_available():
        request.getfixturevalue("poisoned_memory")
        request.getfixturevalue("seeded_single_thread")
        yield
        return
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Both implementations."""
    with chosen(request.param):
        yield request.param
