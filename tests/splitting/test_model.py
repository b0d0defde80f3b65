"""The user's model: what `parallelize` was given, how the model is built, checked and called."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import CNN
from raypar.errors import ModelError
from raypar.splitting.model import ModelSpec, bind_inputs, build_whole, call, on_meta
from support.models import WithOptions


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def spec(build_model: Callable[[], nn.Module]) -> ModelSpec:
    return ModelSpec(build_model, F.cross_entropy, sgd)


# ---------------------------------------------------------------- what parallelize was given


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("build_model", nn.Identity, None),
        ("build_model", None, "found NoneType, needed a function"),
        ("loss_fn", "mse", "found str, needed a function"),
        ("optimizer", 0.1, "found float, needed a function"),
        ("lr_scheduler", None, None),
        ("lr_scheduler", 0.9, "found float, needed a function"),
        ("outer_optimizer", "sgd", "found str, needed a function"),
        ("max_grad_norm", 1.5, None),
        ("max_grad_norm", 0, "needed a number above 0, or None"),
        ("max_grad_norm", float("nan"), "needed a number above 0, or None"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_refused(name: str, value: Any, message: str | None):
    arguments: dict[str, Any] = {"build_model": CNN, "loss_fn": F.cross_entropy, "optimizer": sgd, name: value}
    if message is None:
        ModelSpec(**arguments)
        return
    with pytest.raises(ModelError, match=rf"parallelize\({name}=.*{message}"):
        ModelSpec(**arguments)


# ---------------------------------------------------------------- building


def test_every_process_builds_the_same_weights_from_the_seed():
    state = torch.get_rng_state()
    torch.manual_seed(123)
    one = build_whole(spec(CNN)).state_dict()
    torch.manual_seed(456)
    other = build_whole(spec(CNN)).state_dict()
    torch.set_rng_state(state)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_may_draw_from_numpy_and_python_too():
    def build() -> nn.Module:
        layer = nn.Linear(1, 1)
        layer.bias.data[0] = np.random.rand() + random.random()
        return layer

    assert torch.equal(build_whole(spec(build)).bias, build_whole(spec(build)).bias)  # type: ignore[arg-type]


def test_what_is_no_module_is_refused():
    with pytest.raises(ModelError, match=r"build_model\(\) returned dict, needed a torch\.nn\.Module"):
        build_whole(spec(lambda: {"weights": 1}))  # type: ignore[arg-type, return-value]


def test_a_module_returned_twice_is_refused():
    """Each actor keeps a part of its own. In local mode all replicas would train one and the same weights, and the
    second stage found the first one's."""
    model = CNN()
    build_whole(spec(lambda: model))
    with pytest.raises(ModelError, match="returned before; needed a new one at each call"):
        build_whole(spec(lambda: model))
    build_whole(spec(lambda: copy.deepcopy(model)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.LazyLinear(2), r"'1\.weight' has no shape yet"),
        (lambda: nn.Embedding(3, 2, sparse=True), r"'1' has sparse=True"),
        (lambda: nn.EmbeddingBag(3, 2, sparse=True), r"'1' has sparse=True"),
    ],
)
def test_what_no_actor_could_train_is_refused(layer: Callable[[], nn.Module], message: str):
    with pytest.raises(ModelError, match=message):
        build_whole(spec(lambda: nn.Sequential(nn.Linear(1, 1), layer())))


def test_a_model_on_the_meta_device():
    """It takes no storage, and building it draws no random number."""
    before = torch.get_rng_state()
    model = on_meta(CNN)
    assert model is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


def looks_at_its_weights() -> nn.Module:
    layer = nn.Linear(2, 2)
    assert layer.weight.sum().item() != 7
    return layer


@pytest.mark.parametrize("build", [looks_at_its_weights, lambda: "no module"])
def test_what_cannot_be_built_on_meta(build: Callable[[], Any]):
    """It is None."""
    assert on_meta(build) is None


# ---------------------------------------------------------------- calling


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (torch.zeros(1), ["x"]),
        ((torch.zeros(1),), ["x"]),
        ([torch.zeros(1), torch.zeros(2)], ["x", "mask"]),
        ({"mask": torch.zeros(2), "x": torch.zeros(1)}, ["x", "mask"]),
        ({"x": torch.zeros(1), "scale": 3.0}, ["x", "scale"]),
    ],
)
def test_how_inputs_become_arguments(inputs: Any, names: list[str]):
    """A tensor is the first argument, a sequence the positional arguments, a dict the keyword arguments."""
    assert list(bind_inputs(WithOptions(), inputs)) == names


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": torch.zeros(1)}, "missing a required argument: 'x'"),
        ({"x": torch.zeros(1), "y": 1}, "got an unexpected keyword argument 'y'"),
        ((1, 2, 3, 4, 5), "too many positional arguments"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str):
    """The error shows forward's signature."""
    with pytest.raises(ModelError, match=re.escape("the inputs do not fit WithOptions.forward(x: ")) as caught:
        bind_inputs(WithOptions(), inputs)
    assert message in str(caught.value)
    assert "a dict its keyword arguments" in str(caught.value)


def test_a_whole_model_is_called_by_the_same_rule():
    model, x, mask = WithOptions(), torch.rand(2, 4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert torch.equal(call(model, x), model(x))
    assert torch.equal(call(model, (x, mask)), model(x, mask))
    assert torch.equal(call(model, {"x": x, "flip": True}), model(x, flip=True))
