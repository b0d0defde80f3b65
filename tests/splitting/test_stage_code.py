"""The code of a stage: which values it takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raypar.errors import ModelError
from raypar.splitting.model import Split
from raypar.splitting.split import split_model
from raypar.splitting.stage_code import StageCode


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2)
        self.two = nn.Linear(2, 2)

    def forward(self, a: Tensor, b: Tensor | float = 1.0) -> Tensor:
        found: Tensor = self.two(self.one(a)) + b
        return found


def codes_of(model: nn.Module) -> list[StageCode]:
    return [
        StageCode.of_graph(model, part)
        for part in split_model(model, Split(("two",), arguments=("a", "b")), 2)["train"]
    ]


def test_an_input_goes_to_its_users_alone() -> None:
    model = Two()
    first, second = codes_of(model)
    assert (first.uses_inputs, second.uses_inputs) == (True, True)
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    (made,) = first.run({"a": a}, {})  # b is not needed here
    (output,) = second.run({"a": None, "b": b}, {0: [made]})
    assert torch.equal(output, model(a, b))


def test_an_input_that_a_batch_lacks_is_named() -> None:
    _, second = codes_of(Two())
    with pytest.raises(ModelError, match=r"uses its argument 'b', which this batch lacks \(found \['a'\]\)"):
        second.run((torch.ones(1, 2),), {0: [torch.ones(1, 2)]})


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, a: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        found = self.one(a) * scale
        return self.two(found if mask is None else found * mask)  # type: ignore[no-any-return]


def test_a_default_that_was_traced_is_fixed() -> None:
    """It was ignored: the losses were those of a model without the mask."""
    model, a, mask = Scaled(), torch.randn(3, 2), torch.zeros(3, 2)
    graphs = split_model(model, Split(("two",)), 2)["train"]
    first = StageCode.of_graph(model, graphs[0])
    for inputs in ((a, mask), {"a": a, "mask": mask}):
        with pytest.raises(
            ModelError, match=r"passes the argument 'mask' .* default None, so that it would be ignored"
        ):
            first.run(inputs, {})
    with pytest.raises(
        ModelError, match=r"passes the argument 'scale' .* give parallelize example_inputs like the batches"
    ):
        first.run({"a": a, "scale": 3.0}, {})
    (passed,) = first.run({"a": a, "mask": None, "scale": 2.0}, {})  # what changes nothing may be passed
    assert torch.equal(passed, first.run(a, {})[0])


def test_a_stage_runs_the_users_modules() -> None:
    model = Two()
    first, _ = codes_of(model)
    before = first.run({"a": torch.ones(1, 2), "b": None}, {})[0]
    model.one.weight.data.zero_()
    assert not torch.equal(first.run({"a": torch.ones(1, 2), "b": None}, {})[0], before)


def test_a_whole_model_behind_a_function() -> None:
    """DDP and DataParallel wrap the model."""
    code = StageCode.of_forward(lambda inputs: inputs["x"] * 2)
    assert code.run({"x": torch.ones(1)}, {})[0].tolist() == [2.0]
    assert (code.uses_inputs, code.makes, code.module) == (True, [], None)
    assert StageCode.of_model(nn.Identity()).run((torch.ones(1),), {})[0].tolist() == [1.0]
