"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raypar.loop import local
from raypar.stages.measure import measure_units
from support.processes import Processes, processes


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes run the tests, all of tests/cluster goes to one of them, which starts Ray once, and every
    other file stays whole, so that its fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/cluster" if is_of_cluster(file) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest of what several processes share out comes first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not is_of_cluster(item.nodeid))


def is_of_cluster(nodeid: str) -> bool:
    return nodeid.startswith("tests/cluster/")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Additions in one order, and no fight for the cores with the processes that a test starts."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Processes]:
    """Processes for tests of torch.distributed; one that dies is replaced before the next call."""
    with processes() as running:
        yield running


@pytest.fixture
def even_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """All units of a model take as long as each other, whatever this machine finds when local mode measures them."""

    def measured(*arguments: Any) -> list[float]:
        return [1.0 for _ in measure_units(*arguments)]

    monkeypatch.setattr(local, "measure_units", measured)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt. Python does not install that handler where it starts with SIGINT ignored, as
    every child of a shell's background job does, and many a runner of CI."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
