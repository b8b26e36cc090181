"""What tests must not leave behind for each other."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """The model flushes subnormal floats to zero for the whole process; hypothesis needs them."""
    yield
    torch.set_flush_denormal(False)
