from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models import CNN, mlp
from raypar.errors import SplitError
from raypar.splitting.trace import module_calls, trace
from support.models import WithOptions


def described(graph: fx.Graph) -> list[str]:
    """What a graph computes, in order: names of modules, functions and methods."""
    return [
        str(node.target) if isinstance(node.target, str) else node.target.__name__
        for node in graph.nodes
        if node.op.startswith("call_")
    ]


class Block(nn.Module):
    """Looks at a value: it can be called in a graph, but not be traced itself."""

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


# ---------------------------------------------------------------- the graph


def test_code_between_modules_becomes_nodes():
    assert described(trace(CNN())) == [
        "conv1", "relu", "max_pool2d", "conv2", "relu", "max_pool2d", "flatten", "fc1", "relu", "fc2",
    ]  # fmt: skip


def test_only_sequentials_are_opened():
    """At every depth."""
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


def test_a_module_called_twice_is_listed_once():
    """Where it is called first."""

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
def test_a_missing_argument_keeps_its_default(given: list[str] | None, inputs: list[str], options: dict[str, Any]):
    model, x = WithOptions(), torch.rand(2, 4)
    graph = trace(model, given)
    assert [str(node.target) for node in graph.nodes if node.op == "placeholder"] == inputs
    assert torch.equal(fx.GraphModule(model, graph)(x, *options.values()), model(x, **options))
    assert not any("_assert" in name for name in described(graph))


def test_a_branch_on_an_argument():
    """It cannot be traced."""
    with pytest.raises(SplitError, match='"return -y if flip else y"'):
        trace(WithOptions(), ["x", "flip"])


# ---------------------------------------------------------------- what cannot be traced


def test_looking_at_values_is_refused():
    """The line is named."""

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


def test_without_a_line_the_forward_is_named():
    """Decorators like those of transformers stop torch.fx before it comes to the forward."""

    class Decorated(nn.Module):
        @checked
        def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
            return x

    line = inspect.unwrap(Decorated.forward).__code__.co_firstlineno
    with pytest.raises(SplitError, match=rf"at {re.escape(__file__)}:{line}: ValueError: code: co_varnames"):
        trace(Decorated())


@pytest.mark.parametrize("folder", ["raypar", "torch"])
def test_a_folder_named_like_a_library_is_the_user_s(folder: str, tmp_path: Path):
    """Frames are told apart by the libraries' own folders. Those in any folder named torch were passed over, so that
    only the first line of the forward was named."""
    code = "def forward(self, x):\n    y = x + 1\n    return y if y.sum() > 0 else x\n"
    file = tmp_path / folder / "model.py"
    file.parent.mkdir()
    file.write_text(code)
    names: dict[str, Any] = {}
    exec(compile(code, str(file), "exec"), names)
    with pytest.raises(SplitError, match=rf'at {re.escape(str(file))}:3 "return y if y\.sum\(\) > 0 else x"'):
        trace(type("Looks", (nn.Module,), {"forward": names["forward"]})())


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


def test_arguments_without_names_are_refused():
    """A forward that uses *args is refused; one that only takes them is not."""
    with pytest.raises(SplitError, match=r"Starred cannot be .* its forward uses \*more, which has no fixed number"):
        trace(Starred())
    assert module_calls(trace(TakesAnything())) == ["fc"]


# ---------------------------------------------------------------- what a graph would lose silently


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


def test_buffers_are_read_in_each_step():
    """What is computed from a buffer is computed in each step, not once while tracing."""
    model, x = UsesBuffer(), torch.rand(2, 4)
    code = fx.GraphModule(model, trace(model))
    assert isinstance(model.scale, Tensor)
    model.scale.fill_(9.0)
    assert torch.equal(code(x), model(x))


def test_a_branch_on_a_buffers_values():
    """It cannot be traced."""

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
def test_lost_modes_and_random_numbers_are_refused(build: Callable[[], nn.Module], line: str, why: str):
    """What the graph would not hold is refused, and the line is named."""
    with pytest.raises(SplitError, match=f"cannot be split .*{re.escape(line)}.*{why}.*a module of its own"):
        trace(build())


def test_modes_and_random_numbers_inside_modules():
    """Such code inside a module, and random functions of a value, may stay."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = WithoutGradient()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x)) + torch.rand_like(x)

    assert described(trace(Dropped())) == ["inner", "dropout", "rand_like", "add"]
    with torch.no_grad():  # what is on all the time is not a change
        trace(Dropped())


def test_a_forward_that_counts_its_calls():
    """The graph held the count of the first call forever."""

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


def test_a_forward_of_the_instance_is_refused():
    """One that was set on the model itself."""
    model = Nested()
    model.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(SplitError, match=r"Nested cannot be .* it has a forward of the instance's own"):
        trace(model)


def test_a_sequential_with_hooks_stays_whole():
    model, x = Nested(), torch.rand(2, 4)
    model.body[1].register_forward_hook(doubled)
    graph = trace(model)
    assert module_calls(graph) == ["body.0", "body.1", "block"]
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
    with pytest.raises(SplitError, match=r"its module 'body\.1', which must be opened to split inside it, has hooks"):
        trace(model, opened=["body", "body.1"])
