"""What a message looks like: a header before the first of its key, then tensors alone, matched by order."""

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


def test_one_header_for_each_key() -> None:
    channel = Channel()
    for number in range(3):
        channel.outbox.send(activations(number), [torch.full((2, 3), float(number))], key="a")
    assert channel.log == ["send_header", "send_header", "send", "send", "send"]
    channel.log.clear()
    for number in range(3):
        channel.inbox.post(activations(number), key="a")
    assert channel.log == [], "nothing can be posted before the header is there"
    for number in range(3):
        (tensor,) = drive(channel.inbox.take(activations(number)))
        assert torch.equal(tensor, torch.full((2, 3), float(number)))
    assert channel.log == ["receive_header", "receive_header", "receive", "receive", "receive"]


def test_known_keys_are_posted_at_once() -> None:
    channel = Channel()
    channel.outbox.send(activations(0), [torch.zeros(2)], key="a")
    channel.inbox.post(activations(0), key="a")
    drive(channel.inbox.take(activations(0)))
    channel.log.clear()
    channel.inbox.post(activations(1), key="a")
    channel.inbox.post(activations(2), key="a")
    assert channel.log == ["receive", "receive"]


def test_later_messages_wait_for_a_header() -> None:
    """A receive that is posted too early would take the tensor of the message before it."""
    channel = Channel()
    channel.outbox.send(activations(0), [torch.ones(2)], key="a")
    channel.outbox.send(activations(1), [torch.ones(5)], key="b")
    channel.outbox.send(activations(2), [torch.ones(2) * 2], key="a")
    for number, key in enumerate("aba"):
        channel.inbox.post(activations(number), key)
    received = [drive(channel.inbox.take(activations(number)))[0].tolist() for number in range(3)]
    assert received == [[1.0] * 2, [1.0] * 5, [2.0] * 2]


def test_a_message_carries_any_tree() -> None:
    channel = Channel()
    values = [
        {"x": torch.randn(2, 3), "n": 4, "none": None},
        (torch.arange(3), [torch.tensor(True), 2.5, "name"]),
        torch.Size([1, 2]),
        torch.float16,
    ]
    channel.outbox.send(activations(0), values, key="a")
    channel.inbox.post(activations(0), key="a")
    received = drive(channel.inbox.take(activations(0)))
    assert torch.equal(received[0]["x"], values[0]["x"])  # type: ignore[index]
    assert (received[0]["n"], received[0]["none"]) == (4, None)
    assert received[1][0].tolist() == [0, 1, 2]
    assert isinstance(received[1], tuple)
    assert received[1][1][0].dtype == torch.bool
    assert received[1][1][1:] == [2.5, "name"]
    assert received[2:] == [torch.Size([1, 2]), torch.float16]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_every_dtype_arrives_as_it_was(dtype: torch.dtype) -> None:
    channel = Channel()
    tensor = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    channel.outbox.send(activations(0), [tensor.t()], key="a")  # not contiguous
    channel.inbox.post(activations(0), key="a")
    (received,) = drive(channel.inbox.take(activations(0)))
    assert received.dtype == dtype
    assert torch.equal(received, tensor.t())


def test_the_header_tells_which_gradients_return() -> None:
    channel = Channel()
    for number in range(2):
        values = [torch.ones(2, requires_grad=True), torch.ones(2), torch.arange(2)]
        channel.outbox.send(activations(number), values, key="a")
        channel.inbox.post(activations(number), key="a")
    for number in range(2):
        received = drive(channel.inbox.take(activations(number)))
        assert [tensor.requires_grad for tensor in received] == [True, False, False]
        assert received[0].is_leaf


def test_gradients_need_no_header() -> None:
    """They have the shapes of the tensors that require one."""
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


def test_send_returns_a_new_layout_once() -> None:
    channel = Channel()
    assert channel.outbox.send(activations(0), [torch.ones(2)], key="a") is not None
    assert channel.outbox.send(activations(1), [torch.ones(2)], key="a") is None


def test_a_gradient_of_unknown_layout_is_refused() -> None:
    """An error, not a hang."""
    channel = Channel()
    channel.inbox.post(gradients(0), key="of a")
    channel.inbox.post(activations(0), key="a")
    with pytest.raises(AssertionError, match=r"0F0▶1 waits for the gradient 0B0▶1, whose layout is unknown"):
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
def test_a_changed_layout_is_refused(changed: Any) -> None:
    channel = Channel()
    channel.outbox.send(activations(0), [torch.ones(2)], key="a")
    with pytest.raises(ModelError, match=r"stage 0 made values of another form for micro-batch 1 .*choose `split`"):
        channel.outbox.send(activations(1), changed, key="a")
    assert channel.log == ["send_header", "send_header", "send"], "nothing of it was sent"


def test_sent_tensors_are_held_until_released() -> None:
    channel = Channel()
    channel.outbox.send(activations(0), [torch.ones(2)], key="a")
    ((*headers, (_, sent)),) = channel.outbox.under_way.values()
    assert len(headers) == 2
    assert sent.tolist() == [1.0, 1.0]
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
    ("leaf", "name"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (object(), "a value of type object"),
        (iter([1]), "a value of type list_iterator"),
        (print, "a value of type builtin_function_or_method"),
    ],
)
def test_other_values_are_refused(leaf: Any, name: str) -> None:
    with pytest.raises(SplitError, match=rf"{name}.*cannot cross a stage border.*choose `split`"):
        check_can_cross(leaf)
