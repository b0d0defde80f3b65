"""What a message looks like: a header ahead of the first of its form, then tensors alone, matched by order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raypar.errors import ModelError, SplitError
from raypar.planning.program import Message
from raypar.transport.channel import Inbox, Outbox, check_can_cross, layout_of_gradients
from raypar.transport.interface import drive
from raypar.transport.memory_links import MemoryLink

CPU = torch.device("cpu")


class Channel:
    """Both ends over one link in memory, and what has gone over it."""

    def __init__(self) -> None:
        self.link = MemoryLink()
        self.log: list[str] = []
        for name in ("send", "receive", "send_header", "receive_header"):
            setattr(self.link, name, self._logged(name))
        self.outbox, self.inbox = Outbox(self.link), Inbox(self.link, CPU)

    def _logged(self, name: str) -> Any:
        call = getattr(self.link, name)

        def logged(tensor: Tensor) -> Any:
            self.log.append(name)
            return call(tensor)

        return logged


def activations(microbatch: int) -> Message:
    return Message(0, "F", microbatch, 1)


def gradients(microbatch: int) -> Message:
    return Message(0, "B", microbatch, 1)


def test_a_header_goes_ahead_of_the_first_message_of_a_key_alone() -> None:
    channel = Channel()
    for number in range(3):
        channel.outbox.send(activations(number), [torch.full((2, 3), float(number))], key="a")
    assert channel.log == ["send_header", "send_header", "send", "send", "send"]
    channel.log.clear()
    for number in range(3):
        channel.inbox.post(activations(number), key="a")
    assert channel.log == [], "nothing can be posted before the header is there"
    for number in range(3):
        (found,) = drive(channel.inbox.take(activations(number)))
        assert torch.equal(found, torch.full((2, 3), float(number)))
    assert channel.log == ["receive_header", "receive_header", "receive", "receive", "receive"]


def test_receives_of_a_known_key_are_posted_at_once() -> None:
    channel = Channel()
    channel.outbox.send(activations(0), [torch.zeros(2)], key="a")
    channel.inbox.post(activations(0), key="a")
    drive(channel.inbox.take(activations(0)))
    channel.log.clear()
    channel.inbox.post(activations(1), key="a")
    channel.inbox.post(activations(2), key="a")
    assert channel.log == ["receive", "receive"]


def test_what_is_behind_an_unknown_key_waits_for_its_header() -> None:
    """A receive that is posted too early would take the tensor of the message before it."""
    channel = Channel()
    channel.outbox.send(activations(0), [torch.ones(2)], key="a")
    channel.outbox.send(activations(1), [torch.ones(5)], key="b")
    channel.outbox.send(activations(2), [torch.ones(2) * 2], key="a")
    for number, key in enumerate("aba"):
        channel.inbox.post(activations(number), key)
    found = [drive(channel.inbox.take(activations(number)))[0].tolist() for number in range(3)]
    assert found == [[1.0] * 2, [1.0] * 5, [2.0] * 2]


def test_a_message_carries_any_tree_of_tensors_and_plain_values() -> None:
    channel = Channel()
    values = [
        {"x": torch.randn(2, 3), "n": 4, "none": None},
        (torch.arange(3), [torch.tensor(True), 2.5, "name"]),
        torch.Size([1, 2]),
        torch.float16,
    ]
    channel.outbox.send(activations(0), values, key="a")
    channel.inbox.post(activations(0), key="a")
    found = drive(channel.inbox.take(activations(0)))
    assert torch.equal(found[0]["x"], values[0]["x"])  # type: ignore[index]
    assert (found[0]["n"], found[0]["none"]) == (4, None)
    assert found[1][0].tolist() == [0, 1, 2]
    assert isinstance(found[1], tuple)
    assert found[1][1][0].dtype == torch.bool
    assert found[1][1][1:] == [2.5, "name"]
    assert found[2:] == [torch.Size([1, 2]), torch.float16]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_every_dtype_arrives_as_it_was(dtype: torch.dtype) -> None:
    channel = Channel()
    tensor = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    channel.outbox.send(activations(0), [tensor.t()], key="a")  # not contiguous
    channel.inbox.post(activations(0), key="a")
    (found,) = drive(channel.inbox.take(activations(0)))
    assert found.dtype == dtype
    assert torch.equal(found, tensor.t())


def test_whether_a_gradient_is_due_travels_with_the_header() -> None:
    channel = Channel()
    for number in range(2):
        values = [torch.ones(2, requires_grad=True), torch.ones(2), torch.arange(2)]
        channel.outbox.send(activations(number), values, key="a")
        channel.inbox.post(activations(number), key="a")
    for number in range(2):
        found = drive(channel.inbox.take(activations(number)))
        assert [tensor.requires_grad for tensor in found] == [True, False, False]
        assert found[0].is_leaf


def test_gradients_are_formed_like_the_tensors_that_want_one_and_need_no_header() -> None:
    there, back = Channel(), Channel()
    values = [torch.ones(2, 3, requires_grad=True), torch.arange(4), {"y": torch.ones(5, requires_grad=True)}]
    layout = there.outbox.send(activations(0), values, key="a")
    assert layout is not None
    back.inbox.learn("of a", layout_of_gradients(layout))
    back.inbox.post(gradients(0), key="of a")
    assert back.log == ["receive", "receive"]
    back.outbox.send_tensors(gradients(0), [torch.full((2, 3), 7.0), torch.full((5,), 8.0)])
    first, second = drive(back.inbox.take(gradients(0)))
    assert (first.shape, second.shape) == ((2, 3), (5,))
    assert (first[0, 0].item(), second[0].item()) == (7.0, 8.0)
    assert not first.requires_grad


def test_the_layout_is_told_for_the_first_message_of_a_key_alone() -> None:
    channel = Channel()
    assert channel.outbox.send(activations(0), [torch.ones(2)], key="a") is not None
    assert channel.outbox.send(activations(1), [torch.ones(2)], key="a") is None


def test_a_gradient_whose_form_nobody_told_is_an_error_and_not_a_hang() -> None:
    channel = Channel()
    channel.inbox.post(gradients(0), key="of a")
    channel.inbox.post(activations(0), key="a")
    with pytest.raises(AssertionError, match=r"0F0▶1 waits behind the gradient 0B0▶1, whose layout nobody told"):
        drive(channel.inbox.take(activations(0)))


@pytest.mark.parametrize(
    "changed",
    [
        [torch.ones(3)],
        [torch.ones(2, dtype=torch.float64)],
        [torch.ones(2, requires_grad=True)],
        [torch.ones(2), torch.ones(2)],
        (torch.ones(2),),
        [5],
    ],
    ids=["shape", "dtype", "gradient", "number", "structure", "no-tensor"],
)
def test_a_message_of_another_form_than_the_header_says_is_refused(changed: Any) -> None:
    channel = Channel()
    channel.outbox.send(activations(0), [torch.ones(2)], key="a")
    with pytest.raises(ModelError, match=r"stage 0 made values of another form for micro-batch 1 .*choose `split`"):
        channel.outbox.send(activations(1), changed, key="a")
    assert channel.log == ["send_header", "send_header", "send"], "nothing of it was sent"


def test_what_is_sent_is_kept_until_it_is_released() -> None:
    channel = Channel()
    channel.outbox.send(activations(0), [torch.ones(2)], key="a")
    ((*headers, (_, kept)),) = channel.outbox.under_way.values()
    assert len(headers) == 2
    assert kept.tolist() == [1.0, 1.0]
    drive(channel.outbox.release(activations(0)))
    assert not channel.outbox.under_way


@pytest.mark.parametrize("leaf", [1, 2.5, True, None, "name", torch.Size([2]), torch.float32, CPU, slice(1, 2)])
def test_plain_values_can_cross_a_border(leaf: Any) -> None:
    channel = Channel()
    check_can_cross(leaf)
    channel.outbox.send(activations(0), [leaf], key="a")
    channel.inbox.post(activations(0), key="a")
    assert drive(channel.inbox.take(activations(0))) == [leaf]


@pytest.mark.parametrize(
    ("leaf", "what"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (object(), "a value of type object"),
        (iter([1]), "a value of type list_iterator"),
        (print, "a value of type builtin_function_or_method"),
    ],
)
def test_other_values_are_refused_with_what_to_change(leaf: Any, what: str) -> None:
    with pytest.raises(SplitError, match=rf"{what}.*cannot cross a stage border.*choose `split`"):
        check_can_cross(leaf)
