"""One stage: the border cuts autograd's graph, and the backward pass takes it up where the forward pass left it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.errors import ModelError
from raypar.splitting.stage_code import StageCode, Values
from raypar.stages.stage import Stage


def stage_of(
    run: Callable[[Any, dict[int, Values]], tuple[Any, ...]], *, sends: dict[int, list[str]] | None = None, **more: Any
) -> Stage:
    """A stage that runs a function; it is the last one where it sends nothing."""
    sends = sends or {}
    made = list(dict.fromkeys(name for names in sends.values() for name in names))
    code = StageCode(run, sends=sends, makes=made, **more)
    return Stage(1, {"train": code, "eval": code}, is_last=not sends, loss_fn=lambda output, targets: output.mean())


def leaf(*values: float) -> Tensor:
    """A value as it comes from another stage, of which it wants to know the gradient."""
    return torch.tensor(values, requires_grad=True)


def test_gradients_of_received_values_go_back() -> None:
    stage = stage_of(lambda inputs, received: (received[0][0] * 3,))
    stage.forward(0, None, {0: [leaf(1.0, 2.0)]}, None, rows=2)
    (gradient,) = stage.backward(0, {})[0]
    assert gradient.tolist() == [3.0, 3.0]  # of the sum over rows: the mean times their number


def test_a_loss_without_a_gradient_is_refused() -> None:
    """It silently trained nothing, where plain PyTorch raises an error in loss.backward()."""
    code = StageCode(lambda inputs, received: (received[0][0] * 3,))
    stage = Stage(1, {"train": code}, is_last=True, loss_fn=lambda output, targets: output.mean().detach())
    with pytest.raises(ModelError, match="loss_fn returned a loss without a gradient"):
        stage.forward(0, None, {0: [leaf(1.0)]}, None, rows=1)
    frozen = torch.ones(1)
    stage.forward(0, None, {0: [frozen]}, None, rows=1)
    assert stage.backward(0, {}) == {0: []}


def test_sent_values_are_detached() -> None:
    """requires_grad says whether a gradient is to come back."""
    stage = stage_of(
        lambda inputs, received: (received[0][0] * 2, received[0][0].detach() + 1), sends={2: ["y", "fixed"]}
    )
    sends, loss = stage.forward(0, None, {0: [leaf(1.0)]}, None, rows=1)
    y, fixed = sends[2]
    assert loss is None
    assert (y.grad_fn, y.requires_grad, fixed.requires_grad) == (None, True, False)


def test_gradients_of_two_receivers_are_added() -> None:
    stage = stage_of(lambda inputs, received: (received[0][0] * 2,), sends={2: ["y"], 3: ["y"]})
    stage.forward(0, None, {0: [leaf(1.0)]}, None, rows=1)
    (gradient,) = stage.backward(0, {2: [torch.tensor([10.0])], 3: [torch.tensor([1.0])]})[0]
    assert gradient.tolist() == [22.0]


def test_an_unused_value_gets_a_zero_gradient() -> None:
    stage = stage_of(lambda inputs, received: (received[0][0] * 2,))
    stage.forward(0, None, {0: [leaf(1.0), leaf(5.0, 6.0)]}, None, rows=1)
    used, unused = stage.backward(0, {})[0]
    assert (used.tolist(), unused.tolist()) == ([2.0], [0.0, 0.0])


def test_no_gradient_where_none_is_wanted() -> None:
    stage = stage_of(lambda inputs, received: (received[0][0] * received[0][1],))
    stage.forward(0, None, {0: [leaf(2.0), torch.tensor([3])]}, None, rows=1)
    assert [gradient.tolist() for gradient in stage.backward(0, {})[0]] == [[3.0]]


def test_a_received_value_may_be_changed_in_place() -> None:
    stage = stage_of(lambda inputs, received: (received[0][0].mul_(4).add_(1),))
    _, loss = stage.forward(0, None, {0: [leaf(2.0)]}, None, rows=1)
    assert loss is not None
    assert loss[0].item() == 9.0
    assert stage.backward(0, {})[0][0].tolist() == [4.0]


def test_backward_in_any_order() -> None:
    """What a micro-batch has kept is gone after its backward pass."""
    stage = stage_of(lambda inputs, received: (received[0][0] ** 2,))
    for number in range(3):
        stage.forward(number, None, {0: [leaf(float(number))]}, None, rows=1)
    assert sorted(stage.saved) == [0, 1, 2]
    assert [stage.backward(number, {})[0][0].item() for number in (2, 0, 1)] == [4.0, 0.0, 2.0]
    assert not stage.saved


def test_a_dropped_step_keeps_nothing() -> None:
    stage = stage_of(lambda inputs, received: (received[0][0],))
    stage.forward(0, None, {0: [leaf(1.0)]}, None, rows=1)
    stage.drop_step()
    assert not stage.saved


def test_evaluation_keeps_nothing() -> None:
    """No activations, no graph."""
    layer = nn.Linear(2, 2)
    stage = stage_of(lambda inputs, received: (layer(inputs),), sends={2: ["y"]})
    sends, _ = stage.evaluate("eval", torch.ones(1, 2), {}, None, 1, with_loss=False)
    assert not sends[2][0].requires_grad
    assert not stage.saved


# ---------------------------------------------------------------- the loss


def last_stage(loss_fn: Callable[[Tensor, Tensor], Any]) -> Stage:
    model = nn.Identity()
    return Stage(
        0, {"train": StageCode.of_model(model), "eval": StageCode.of_model(model)}, is_last=True, loss_fn=loss_fn
    )


def test_a_mean_counts_as_often_as_it_has_rows() -> None:
    stage = last_stage(F.mse_loss)
    _, loss = stage.forward(0, torch.tensor([1.0, 3.0]), {}, torch.zeros(2), rows=2)
    assert loss is not None
    assert (loss[0].item(), loss[1].item()) == (10.0, 2.0)


def test_a_pair_is_a_sum_and_its_weight() -> None:
    stage = last_stage(lambda output, targets: (output.sum(), 7))
    _, loss = stage.forward(0, torch.tensor([1.0, 3.0]), {}, torch.zeros(2), rows=2)
    assert loss is not None
    assert (loss[0].item(), loss[1].item()) == (4.0, 7.0)


def test_the_weight_gets_no_gradient() -> None:
    """It may be a tensor of autograd's graph."""
    stage = last_stage(lambda output, targets: [output.sum(), output.sum()])
    _, loss = stage.forward(0, leaf(1.0, 3.0), {}, torch.zeros(2), rows=2)
    assert loss is not None
    assert not loss[1].requires_grad


def test_a_loss_of_one_element_may_have_dimensions() -> None:
    stage = last_stage(lambda output, targets: output.mean().reshape(1, 1))
    _, loss = stage.forward(0, torch.tensor([1.0, 3.0]), {}, torch.zeros(2), rows=2)
    assert loss is not None
    assert loss[0].shape == ()


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.ones(2), r"a tensor of shape \(2,\)"), (0.5, "float"), (None, "NoneType"), ((0.5, 2), "float")],
)
def test_any_other_loss_is_refused(value: Any, found: str) -> None:
    stage = last_stage(lambda output, targets: value)
    with pytest.raises(ModelError, match=rf"loss_fn returned {found}, needed a scalar tensor"):
        stage.forward(0, torch.ones(2), {}, torch.zeros(2), rows=2)
