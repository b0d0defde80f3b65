"""What holds for all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Additions in one order, and no fight for the cores with the processes that a test starts."""
    torch.set_num_threads(1)
