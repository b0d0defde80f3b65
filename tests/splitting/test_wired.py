"""A model wired by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raypar
from raypar import Wired
from raypar.errors import ModelError
from raypar.planning.plan import Plan
from raypar.splitting.model import Split, bind_inputs
from raypar.splitting.split import opened_for
from raypar.splitting.trace import module_calls, trace
from support import reference
from support.cases import PIPELINES, name_of, sgd
from support.engines import Engines, assert_equal, spec_of


class Block(nn.Module):
    """Looks at its values: no tracer can look into it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x) if x.sum() > 0 else self.layer(-x)
        return torch.tanh(y), x * scale


class Sums(nn.Module):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


def build() -> Wired:
    return Wired(
        "images",
        [
            ("flat", nn.Flatten(), "images -> x"),
            ("embed", nn.Linear(784, 8), "x -> h"),
            ("scale", Scale(), "x -> scale"),
            ("one", Block(), "h, scale -> h, skip"),
            ("two", Block(), "h, scale -> h, _"),
            ("sums", Sums(), "h, skip -> h"),
            ("head", nn.Linear(8, 10), "h -> logits"),
        ],
    )


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(784, 8)
        self.one, self.two = Block(), Block()
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        h, scale = self.embed(x), x.mean(1, keepdim=True)
        h, skip = self.one(h, scale)
        h, _ = self.two(h, scale)
        return self.head(h + skip)  # type: ignore[no-any-return]


def test_names_wire_values_and_state() -> None:
    """Values go where their names stand, and the state dict has the names of the entries."""
    model, plain, images = build(), ByHand(), torch.rand(3, 1, 28, 28)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images), plain(images))
    assert torch.equal(model(images=images), plain(images))
    assert list(bind_inputs(model, images)) == ["images"]
    assert isinstance(model, Wired)
    assert type(model).__name__ == "Wired"


def test_a_stage_may_begin_at_each_module() -> None:
    model = build()
    assert module_calls(trace(model)) == ["flat", "embed", "scale", "one", "two", "sums", "head"]
    assert opened_for(model, 7, Split()) == ()


@pytest.mark.parametrize("plan", PIPELINES, ids=name_of)
def test_a_wired_model_trains_as_a_plain_loop(plan: Plan) -> None:
    """Wherever it is split."""
    batches = reference.images(3, 8)
    engines = Engines(plan, spec_of(build, ("one", "sums"), optimizer=sgd))
    losses = engines.train(batches)
    needed = reference.train_on_microbatches(ByHand, batches, sgd, nn.functional.cross_entropy, 1, 4)
    assert_equal(engines, losses, needed)


def test_what_is_returned_may_be_named() -> None:
    x = torch.rand(2, 8)
    entries: list[Any] = [("a", nn.Tanh(), "x -> y"), ("b", nn.ReLU(), "y -> z")]
    assert torch.equal(Wired("x", entries)(x), x.tanh().relu())
    assert torch.equal(Wired("x", entries, "z")(x), x.tanh().relu())
    first, second = Wired("x", entries, result="y, z")(x)
    assert torch.equal(first, x.tanh())
    assert torch.equal(second, x.tanh().relu())
    pair = Wired("x, s", [("one", Block(), "x, s -> h, skip")])(x, x)
    assert [tuple(value.shape) for value in pair] == [(2, 8), (2, 8)]


def test_a_wired_model_can_be_copied_and_pickled() -> None:
    model, images = build(), torch.rand(2, 1, 28, 28)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))


def test_a_module_at_two_places_has_two_names() -> None:
    shared = nn.Linear(8, 8)
    model = Wired("x", [("a", shared, "x -> x"), ("act", nn.ReLU(), "x -> x"), ("b", shared, "x -> x")])
    assert model.a is model.b
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]


@pytest.mark.parametrize(
    ("inputs", "entries", "result", "message"),
    [
        ("x", [], None, r"Wired\('x', \[\]\): found no modules"),
        ("x, ", [("a", "x -> y")], None, "found 'x, ' for inputs, needed names with commas between"),
        ("x, x", [("a", "x -> y")], None, "found 'x, x' for inputs"),
        (7, [("a", "x -> y")], None, "found 7 for inputs"),
        ("mask", [("a", "musk -> y")], None, "'a' takes 'musk', which nothing before it makes; did you mean 'mask'"),
        ("x", [("a", "x -> y"), ("b", "y -> z"), ("a", "z -> y")], None, "the name 'a' stands there twice"),
        ("x", [("a.b", "x -> y")], None, r"the name 'a\.b' cannot be the name of a module"),
        ("x", [("forward", "x -> y")], None, "the name 'forward' cannot be"),
        ("x", [("training", "x -> y")], None, "the name 'training' cannot be"),
        ("x", [("class", "x -> y")], None, "the name 'class' cannot be"),
        ("x", [("a", "x, y")], None, r"found 'x, y' for 'a', needed \(name, module, \"values it takes -> values"),
        ("x", [("a", "x -> y -> z")], None, "found 'x -> y -> z' for 'a'"),
        ("x", [("a", "x -> ")], None, "found ' ' for what 'a' returns"),
        ("x", [("a", "x -> y, y")], None, "found ' y, y' for what 'a' returns"),
        ("x", [("a", "x y -> z")], None, "found 'x y ' for what 'a' takes"),
        ("x, mask", [("a", "x -> y")], None, "nothing takes 'mask', which comes from the inputs"),
        ("x", [("a", "x -> y, z"), ("b", "y -> y")], None, "nothing takes 'z', which comes from 'a': take it"),
        ("x", [("a", "x -> y"), ("b", "x -> y")], None, "nothing takes 'y', which comes from 'a'"),
        ("x", [("a", "x -> y")], "z", "the result names 'z', which nothing before it makes; known: 'x', 'y'"),
        ("x", [("a", "x -> y"), ("b", "x -> z")], "z", "nothing takes 'y', which comes from 'a'"),
    ],
)
def test_a_wrong_wiring_is_refused_when_made(
    inputs: Any, entries: list[tuple[str, str]], result: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Wired(inputs, [(name, nn.Identity(), wire) for name, wire in entries], result)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("a", nn.Identity()), "found the entry"),
        ((nn.Identity(), "x -> y"), "found the entry"),
        (("a", torch.tanh, "x -> y"), "found a builtin_function_or_method as 'a'"),
        (("a", nn.Linear, "x -> y"), "found a type as 'a'"),
        ("x -> y", "found the entry 'x -> y'"),
    ],
)
def test_an_entry_of_another_form_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Wired("x", [entry])


def test_a_wrong_number_of_values_is_refused() -> None:
    """A module must return as many values as its wiring names."""
    x = torch.rand(3, 8)
    model = Wired("x", [("one", nn.Identity(), "x -> a, b, c"), ("two", nn.Identity(), "a -> d")], "b, c, d")
    with pytest.raises(ModelError, match="the module 'one' returned Tensor, needed a tuple of 3, as wired"):
        model(x)
    model = Wired("x, s", [("one", Block(), "x, s -> a, b, c")])
    with pytest.raises(ModelError, match="the module 'one' returned 2 values, needed a tuple of 3"):
        model(x, x)


def test_it_has_a_public_name() -> None:
    assert raypar.Wired is Wired
