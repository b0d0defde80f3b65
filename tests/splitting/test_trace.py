from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models import CNN, mlp
from raypar.errors import ModelError, SplitError
from raypar.splitting.model import bind_inputs, call, on_meta
from raypar.splitting.trace import module_calls, trace


def described(graph: fx.Graph) -> list[str]:
    """What a graph computes, in order: names of modules, functions and methods."""
    return [
        str(node.target) if isinstance(node.target, str) else node.target.__name__
        for node in graph.nodes
        if node.op.startswith("call_")
    ]


class Block(nn.Module):
    """Looks at a value: it can be a leaf of a graph, but not be traced itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.body(x))


class WithOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flip: bool = False) -> Tensor:
        y = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        return -y if flip else y


# ---------------------------------------------------------------- the graph


def test_what_happens_between_the_modules_becomes_nodes_of_its_own():
    assert described(trace(CNN())) == [
        "conv1", "relu", "max_pool2d", "conv2", "relu", "max_pool2d", "flatten", "fc1", "relu", "fc2",
    ]  # fmt: skip


def test_sequentials_are_opened_at_every_depth_and_other_modules_are_not():
    assert module_calls(trace(Nested())) == ["body.0", "body.1.0", "body.1.1", "block"]
    assert module_calls(trace(mlp())) == ["0", "1", "2", "3", "4", "5"]


def test_a_module_that_is_named_is_opened_too():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = CNN()

        def forward(self, x: Tensor) -> Tensor:
            return self.cnn(x)

    assert module_calls(trace(Outer())) == ["cnn"]
    assert module_calls(trace(Outer(), opened=["cnn"])) == ["cnn.conv1", "cnn.conv2", "cnn.fc1", "cnn.fc2"]


def test_a_module_that_is_called_twice_is_listed_once_where_it_is_called_first():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.b(x)))

    assert module_calls(trace(Twice())) == ["b", "a"]


# ---------------------------------------------------------------- arguments of forward


@pytest.mark.parametrize(
    ("given", "inputs", "options"),
    [
        (None, ["x"], {}),
        (["x"], ["x"], {}),
        (["x", "mask"], ["x", "mask"], {"mask": torch.tensor([1.0, 0.0, 1.0, 0.0])}),
        (["x", "scale"], ["x", "scale"], {"scale": 3.0}),
    ],
)
def test_an_argument_that_is_not_given_keeps_its_default(
    given: list[str] | None, inputs: list[str], options: dict[str, Any]
):
    model, x = WithOptions(), torch.rand(2, 4)
    graph = trace(model, given)
    assert [str(node.target) for node in graph.nodes if node.op == "placeholder"] == inputs
    assert torch.equal(fx.GraphModule(model, graph)(x, *options.values()), model(x, **options))
    assert not any("_assert" in name for name in described(graph))


def test_a_branch_on_a_given_argument_cannot_be_traced():
    with pytest.raises(SplitError, match='"return -y if flip else y"'):
        trace(WithOptions(), ["x", "flip"])


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
def test_a_tensor_is_the_first_argument_a_sequence_the_positional_ones_a_dict_the_keywords(
    inputs: Any, names: list[str]
):
    assert list(bind_inputs(WithOptions(), inputs)) == names


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": torch.zeros(1)}, "missing a required argument: 'x'"),
        ({"x": torch.zeros(1), "y": 1}, "got an unexpected keyword argument 'y'"),
        ((1, 2, 3, 4, 5), "too many positional arguments"),
    ],
)
def test_inputs_that_do_not_fit_forward_are_refused_with_its_signature(inputs: Any, message: str):
    with pytest.raises(ModelError, match=re.escape("the inputs do not fit WithOptions.forward(x: ")) as caught:
        bind_inputs(WithOptions(), inputs)
    assert message in str(caught.value)
    assert "a dict its keyword arguments" in str(caught.value)


def test_a_whole_model_is_called_by_the_same_rule():
    model, x, mask = WithOptions(), torch.rand(2, 4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert torch.equal(call(model, x), model(x))
    assert torch.equal(call(model, (x, mask)), model(x, mask))
    assert torch.equal(call(model, {"x": x, "flip": True}), model(x, flip=True))


# ---------------------------------------------------------------- what cannot be traced


def test_a_forward_that_looks_at_values_is_refused_and_the_line_is_named():
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(x)
            if y.sum() > 0:  # this line
                return y
            return x

    with pytest.raises(SplitError, match=r"Looks cannot be split into stages: torch\.fx could not trace") as caught:
        trace(Looks())
    message = str(caught.value)
    line = Looks.forward.__code__.co_firstlineno + 2
    assert f'{__file__}:{line} "if y.sum() > 0:  # this line"' in message
    assert "TraceError" in message
    assert "move such code into a module of its own (modules are not looked into), wire the modules by hand" in message
    assert caught.value.__cause__ is not None


def test_an_error_of_the_users_own_is_told_as_such():
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)  # type: ignore[operator, no-any-return]

    with pytest.raises(SplitError, match=r"AttributeError: .*'Wrong' object has no attribute 'fc'"):
        trace(Wrong())


def checked(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, *args, **kwargs)

    return wrapper


def test_where_no_line_of_the_users_is_known_the_forward_is_named():
    """Decorators like those of transformers stop torch.fx before it comes to the forward."""

    class Decorated(nn.Module):
        @checked
        def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
            return x

    line = inspect.unwrap(Decorated.forward).__code__.co_firstlineno
    with pytest.raises(SplitError, match=rf"at {re.escape(__file__)}:{line}: ValueError: code: co_varnames"):
        trace(Decorated())


def test_such_code_is_no_hindrance_inside_a_module():
    assert module_calls(trace(Nested())) == ["body.0", "body.1.0", "body.1.1", "block"]
    with pytest.raises(SplitError, match=r"return self\.inner"):
        trace(Nested(), opened=["block"])


class Starred(nn.Module):
    def forward(self, x: Tensor, *more: Tensor, **options: Tensor) -> Tensor:
        return x + more[0]


class TakesAnything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, *more: Tensor, **options: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def test_a_forward_that_uses_arguments_without_names_is_refused_and_one_that_only_takes_them_is_not():
    with pytest.raises(SplitError, match=r"Starred cannot be .* its forward uses \*more, which has no fixed number"):
        trace(Starred())
    assert module_calls(trace(TakesAnything())) == ["fc"]


# ---------------------------------------------------------------- what a graph would lose without a word


class UsesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 4.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        for column in range(self.scale.shape[0]):
            y = y + self.scale[column].sqrt()
        return y / self.scale.sqrt()


def test_what_is_computed_from_a_buffer_is_computed_in_each_step_and_not_once_while_tracing():
    model, x = UsesBuffer(), torch.rand(2, 4)
    code = fx.GraphModule(model, trace(model))
    assert isinstance(model.scale, Tensor)
    model.scale.fill_(9.0)
    assert torch.equal(code(x), model(x))


def test_a_branch_on_the_values_of_a_buffer_cannot_be_traced():
    class Branches(UsesBuffer):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.scale.sum() > 0 else -x

    with pytest.raises(SplitError, match=r'"return x if self\.scale\.sum\(\) > 0 else -x"'):
        trace(Branches())


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.head(x)  # type: ignore[no-any-return]


class LowPrecision(WithoutGradient):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.frozen(x)
        return self.head(x.float())  # type: ignore[no-any-return]


class Noisy(WithoutGradient):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(x) + torch.randn(4))  # type: ignore[no-any-return]


class NoisyFromNumPy(WithoutGradient):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(x) * float(np.random.rand()))  # type: ignore[no-any-return]


class SkipsAtRandom(WithoutGradient):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(x) if random.random() < 0.5 else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "line", "why"),
    [
        (WithoutGradient, "x = self.frozen(x)", r"grad mode \(no_grad"),
        (LowPrecision, "x = self.frozen(x)", "autocast"),
        (Noisy, "torch.randn(4)", "a random number is drawn"),
        (NoisyFromNumPy, "np.random.rand()", "a random number is drawn"),
        (SkipsAtRandom, "random.random()", "a random number is drawn"),
    ],
)
def test_a_mode_or_a_random_number_that_the_graph_would_not_hold_is_refused_at_its_line(
    build: Callable[[], nn.Module], line: str, why: str
):
    with pytest.raises(SplitError, match=f"cannot be split .*{re.escape(line)}.*{why}.*a module of its own"):
        trace(build())


def test_such_code_inside_a_module_and_random_functions_of_a_value_are_no_hindrance():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = WithoutGradient()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x)) + torch.rand_like(x)

    assert described(trace(Dropped())) == ["inner", "dropout", "rand_like", "add"]
    with torch.no_grad():  # what is on all the time is not a change
        trace(Dropped())


def test_a_forward_that_counts_its_calls_is_refused_and_one_that_keeps_a_number_is_not():
    """The graph held the count of the first call for ever."""

    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls, self.factor = nn.Linear(4, 4), 0, float("nan")

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x) / self.calls  # type: ignore[no-any-return]

    with pytest.raises(SplitError, match=r"Decays cannot be .* its forward changes its attribute 'calls'"):
        trace(Decays())
    with pytest.raises(SplitError, match=r"changes its attribute '0\.calls'"):
        trace(nn.Sequential(Decays()), opened=["0"])
    assert module_calls(trace(nn.Sequential(Decays()))) == ["0"]


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def test_hooks_on_the_model_itself_are_refused():
    model = Nested()
    model.register_forward_hook(doubled)
    with pytest.raises(SplitError, match=r"Nested cannot be split into stages: it has hooks, which would be lost"):
        trace(model)


def test_a_forward_that_was_set_on_the_model_itself_is_refused():
    model = Nested()
    model.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(SplitError, match=r"Nested cannot be .* it has a forward of the instance's own"):
        trace(model)


def test_a_sequential_with_hooks_stays_whole_and_cannot_be_opened():
    model, x = Nested(), torch.rand(2, 4)
    model.body[1].register_forward_hook(doubled)
    graph = trace(model)
    assert module_calls(graph) == ["body.0", "body.1", "block"]
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
    with pytest.raises(SplitError, match=r"its module 'body\.1', which must be opened to split inside it, has hooks"):
        trace(model, opened=["body", "body.1"])


# ---------------------------------------------------------------- small helpers


def test_on_the_meta_device_a_model_takes_no_storage_and_draws_no_random_number():
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
def test_a_model_that_cannot_be_built_without_storage_is_none(build: Callable[[], Any]):
    assert on_meta(build) is None
