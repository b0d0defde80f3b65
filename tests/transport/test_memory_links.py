"""Links and sums in memory, and the turns that engines take: the world of local mode."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from raypar.planning.plan import Plan
from raypar.transport.interface import Done, drive, take_turns
from raypar.transport.memory_links import MemoryLink, MemorySum, MemoryWorld


class Never:
    """Work that never ends."""

    def ready(self) -> bool:
        return False

    def wait(self) -> None:
        raise AssertionError("waited for something that never ends")


def waits_for(*works: Any, result: Any = None) -> Generator[Any, None, Any]:
    yield from works
    return result


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("posted_first", [True, False])
def test_messages_arrive_in_order(posted_first: bool) -> None:
    link = MemoryLink()
    sent = [torch.tensor([float(number)]) for number in range(3)]
    received = [torch.zeros(1) for _ in range(3)]
    if posted_first:
        works = [link.receive(tensor) for tensor in received]
        assert not any(work.ready() for work in works)
    for tensor in sent:
        assert link.send(tensor).ready()
    if not posted_first:
        works = [link.receive(tensor) for tensor in received]
    assert all(work.ready() for work in works)
    assert [tensor.item() for tensor in received] == [0.0, 1.0, 2.0]


def test_the_receiver_gets_a_copy() -> None:
    link = MemoryLink()
    sent, received = torch.ones(2), torch.zeros(2)
    link.send(sent)
    link.receive(received)
    sent.zero_()
    assert received.tolist() == [1.0, 1.0]


def test_headers_do_not_wait_for_data() -> None:
    link = MemoryLink()
    link.send(torch.ones(5))
    link.send_header(torch.tensor([7]))
    header = torch.zeros(1, dtype=torch.int64)
    assert link.receive_header(header).ready()
    assert header.item() == 7


# ---------------------------------------------------------------- sums


def test_sums_are_added_in_member_order() -> None:
    """Additions in float32 depend on their order: 2²⁴ + 1 + 1 is 2²⁴ from the left and 2²⁴ + 2 from the right."""
    values = [2.0**24, 1.0, 1.0]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        whole = MemorySum(3)
        tensors = [torch.tensor([value]) for value in values]
        works = {index: whole.member(index).sum(tensors[index]) for index in order}
        assert all(work.ready() for work in works.values())
        assert [tensor.item() for tensor in tensors] == [2.0**24] * 3


def test_rounds_of_a_sum_do_not_mix() -> None:
    """A sum waits for its last member, also where others are already at the next one."""
    whole = MemorySum(2)
    first, second, other = torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([2.0])
    works = [whole.add(0, first), whole.add(0, second)]
    assert not any(work.ready() for work in works)
    assert whole.add(1, other).ready()
    assert [work.ready() for work in works] == [True, False]
    assert (first.item(), second.item(), other.item()) == (3.0, 10.0, 3.0)


def test_a_world_connects_all_engines() -> None:
    """Neighbours in a replica, a stage in all replicas, and all of them for the commit."""
    world = MemoryWorld(Plan(data=2, pipeline=2))
    one, other = world.transport(0, 1), world.transport(1, 1)
    mine, yours = one.same_stage(1), other.same_stage(1)
    assert mine is not None
    assert yours is not None
    assert mine.whole is yours.whole
    everyone = one.everyone()
    assert everyone is not None
    assert everyone.size == 4
    assert world.transport(0, 0).link_to(1) is world.transport(0, 1).link_from(0)
    assert world.transport(0, 0).link_to(1) is not world.transport(1, 0).link_to(1)


def test_a_single_engine_has_no_collective() -> None:
    alone = MemoryWorld(Plan()).transport(0, 0)
    assert alone.same_stage(0) is None
    assert alone.everyone() is None


# ---------------------------------------------------------------- taking turns


def test_engines_run_until_they_must_wait() -> None:
    link = MemoryLink()
    noted: list[str] = []

    def sender() -> Generator[Any, None, str]:
        noted.append("sender begins")
        yield link.send(torch.ones(1))
        noted.append("sender ends")
        return "sent"

    def receiver() -> Generator[Any, None, float]:
        noted.append("receiver begins")
        tensor = torch.zeros(1)
        yield link.receive(tensor)
        noted.append("receiver ends")
        return tensor.item()

    assert take_turns([receiver(), sender()]) == [1.0, "sent"]
    assert noted == ["receiver begins", "sender begins", "sender ends", "receiver ends"]


def test_a_deadlock_is_an_error() -> None:
    """Engines that wait for each other do not hang."""
    with pytest.raises(AssertionError, match=r"deadlock: the engines \[0, 2\] wait for each other"):
        take_turns([waits_for(Never()), waits_for(Done()), waits_for(Never())])


def test_an_error_ends_all_engines() -> None:
    closed: list[int] = []

    def waiting(index: int) -> Generator[Any, None, None]:
        try:
            yield Never()
        finally:
            closed.append(index)

    def failing() -> Generator[Any, None, None]:
        yield Done()
        raise ValueError("found something")

    with pytest.raises(ValueError, match="found something"):
        take_turns([waiting(0), waiting(1), failing()])
    assert closed == [0, 1]


# ---------------------------------------------------------------- driving one engine


def test_drive_blocks_in_each_wait() -> None:
    """`ready` is not asked: only links in memory can tell."""
    waited: list[str] = []

    class Blocking:
        def ready(self) -> bool:
            raise AssertionError("only links in memory can tell")

        def wait(self) -> None:
            waited.append("waited")

    assert drive(waits_for(Blocking(), Blocking(), result="the end")) == "the end"
    assert waited == ["waited", "waited"]


def test_a_failed_wait_raises_inside_the_engine() -> None:
    class Fails:
        def ready(self) -> bool:
            return True

        def wait(self) -> None:
            raise RuntimeError("the other side is gone")

    def engine() -> Generator[Any, None, str]:
        try:
            yield Fails()
        except RuntimeError as error:
            return f"noticed: {error}"
        return "noticed nothing"

    assert drive(engine()) == "noticed: the other side is gone"
