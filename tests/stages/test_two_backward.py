"""A backward pass in two parts equals the whole one, whatever leads to inputs, to weights, or to both."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from raypar.stages import two_backward
from raypar.stages.two_backward import backward_to_inputs
from support.engines import TOLERANCE

WIDTH = 4
Run = Callable[[Any, Tensor], Any]


class Weights(nn.Module):
    """What the cases below use, each of them some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.conv, self.words = nn.Conv1d(1, 2, 3, padding=1), nn.Embedding(6, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        self.memory = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.vector, self.matrix = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))


class _Scaled(torch.autograd.Function):
    """A user's own: multiplies by a weight, and has a third argument that needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        ctx.variable = "a name that autograd's own nodes use too"
        return x * weight * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight * ctx.factor, (grads[0] * x * ctx.factor).sum(0), None


def with_hooks(m: Weights, x: Tensor) -> Tensor:
    """Hooks on a junction's output, after it, and on what is made of a weight alone."""
    first = m.one(x)
    first.register_hook(lambda g: g * 2)
    gate = m.vector.exp()
    gate.register_hook(lambda g: g * 3)
    second = torch.tanh(first * gate)
    second.register_hook(lambda g: g + 1)
    return m.two(second)  # type: ignore[no-any-return]


def shared_within(m: Weights, x: Tensor) -> Tensor:
    weight = torch.exp(m.matrix)
    return F.linear(torch.tanh(F.linear(x, weight)), weight)


def autocast(m: Weights, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.one(torch.tanh(m.one(x))).float()  # type: ignore[no-any-return]


def in_place(m: Weights, x: Tensor) -> Tensor:
    y = m.one(x)
    y += m.vector
    return F.relu(y.mul_(2.0), inplace=True)


def sent_twice(m: Weights, x: Tensor) -> list[Tensor]:
    y = m.one(x)
    return [y, y, m.two(y) + x]


CASES: dict[str, Run] = {
    "linear": lambda m, x: m.one(x),
    "linears": lambda m, x: m.two(torch.tanh(m.one(x))),
    "layer norm": lambda m, x: m.two(m.norm(m.one(x))),
    "batch norm": lambda m, x: m.one(m.batch_norm(x)),
    "convolution": lambda m, x: m.conv(x[:, None]),
    "embedding": lambda m, x: m.one(x + m.words(torch.arange(3))),
    "attention": lambda m, x: m.attention(x[None], x[None], x[None], need_weights=False)[0],
    "attention to weights": lambda m, x: m.attention(x[None], m.matrix[None], m.matrix[None])[0],
    "transformer block": lambda m, x: m.block(x[None]),
    "gru": lambda m, x: m.memory(x[None])[0],
    "weight norm": lambda m, x: m.normed(x),
    "weight norm, called twice": lambda m, x: m.normed(torch.tanh(m.normed(x))),
    "spectral norm": lambda m, x: m.spectral(x),
    "a function of the user's": lambda m, x: _Scaled.apply(m.one(x), m.vector, 2.0),
    "a linear layer called twice": lambda m, x: m.one(torch.tanh(m.one(x))),
    "a norm called twice": lambda m, x: m.norm(torch.tanh(m.norm(x))),
    "a weight in two layers": lambda m, x: F.linear(torch.tanh(F.linear(x, m.matrix)), m.matrix.t()),
    "a weight and what is made of it, at one node": lambda m, x: torch.addcmul(m.vector, x, m.vector.exp()),
    "a weight used at a large node and at a small one": lambda m, x: F.linear(x, m.matrix) * m.matrix[0],
    "what is made of a weight, used twice": shared_within,
    "recomputed by torch": lambda m, x: checkpoint(
        lambda y: m.two(torch.tanh(m.one(y))), m.norm(x), use_reentrant=False
    ),
    "autocast": autocast,
    "in place": in_place,
    "hooks": with_hooks,
    "several outputs": sent_twice,
    "a skip": lambda m, x: [m.one(x) + x, x * m.vector],
    "an output that is a weight": lambda m, x: [m.one(x), m.vector],
    "an output that is a weight used elsewhere": lambda m, x: [x * m.vector, m.vector],
    "an output of weights alone": lambda m, x: [m.one(x), m.vector * 2],
    "an output of weights used elsewhere": lambda m, x: [m.one(x), m.one.weight.exp(), m.matrix.exp(), m.matrix.sin()],
    "outputs of weights alone": lambda m, x: [m.matrix.exp(), m.matrix + m.vector],
    "no weight": lambda m, x: torch.tanh(x),
    "a weight that gets no gradient": lambda m, x: m.one(x) + (m.two(x) * m.vector).detach(),
}


@pytest.fixture(params=["large", "small"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The weights are small for the code, or large, though they are the same."""
    if request.param == "large":
        monkeypatch.setattr(two_backward, "SMALL", 0)
    return str(request.param)


def made(case: Run, model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What a case makes, and gradients for it."""
    found = case(model, x)
    outputs = found if isinstance(found, list) else [found]
    numbers = torch.Generator().manual_seed(5)
    return outputs, [torch.randn(output.shape, generator=numbers).to(output.dtype) for output in outputs]


def inputs(microbatch: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(microbatch))


def fresh() -> Weights:
    torch.manual_seed(0)
    return Weights()


def assert_same_gradients(model: nn.Module, needed: nn.Module) -> None:
    for (name, found), plain in zip(model.named_parameters(), needed.parameters(), strict=True):
        assert (found.grad is None) == (plain.grad is None), name
        if found.grad is not None:
            torch.testing.assert_close(found.grad, plain.grad, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_both_parts_make_the_whole_gradients(name: str, size: str) -> None:
    """Three micro-batches, the weights' parts later than all inputs' parts but one.

    History: a module that was called twice within a stage got the gradient of its bias twice, or raised "Trying to
    backward through the graph a second time"; an output that is a weight itself got none.
    """
    model, plain = fresh(), fresh()
    parts = []
    for microbatch in range(3):
        x, same = inputs(microbatch).requires_grad_(), inputs(microbatch).requires_grad_()
        torch.autograd.backward(*made(CASES[name], plain, same))
        (found,), part = backward_to_inputs(*made(CASES[name], model, x), [x])
        parts.append(part)
        assert (found is None) == (same.grad is None)
        if found is not None:
            torch.testing.assert_close(found, same.grad, atol=TOLERANCE, rtol=TOLERANCE)
        if microbatch == 1:
            parts.pop(0).run()
    for part in parts:
        part.run()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("name", CASES)
def test_without_inputs_all_is_deferred(name: str, size: str) -> None:
    """If no input requires a gradient, everything is left for the second part."""
    model, plain = fresh(), fresh()
    outputs, gradients = made(CASES[name], model, inputs(0))
    pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output.requires_grad]
    leaves, part = backward_to_inputs([output for output, _ in pairs], [gradient for _, gradient in pairs], [])
    assert leaves == []
    assert all(parameter.grad is None for parameter in model.parameters())
    part.run()
    outputs, gradients = made(CASES[name], plain, inputs(0))
    for output, gradient in zip(outputs, gradients, strict=True):
        if output.requires_grad:
            output.backward(gradient, retain_graph=True)
    assert_same_gradients(model, plain)


def test_large_weights_are_left_for_the_second_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_backward, "SMALL", WIDTH * WIDTH)
    model, x = fresh(), inputs(0).requires_grad_()
    _, part = backward_to_inputs(*made(lambda m, y: m.two(m.norm(m.one(y))), model, x), [x])
    assert model.one.weight.grad is model.two.weight.grad is model.one.bias.grad is None
    assert model.norm.weight.grad is not None, "a small one is done at once"
    part.run()
    assert model.one.weight.grad is not None
    assert model.two.weight.grad is not None


def test_a_loss_needs_no_gradient_given(size: str) -> None:
    model, plain, x = fresh(), fresh(), inputs(0).requires_grad_()
    _, part = backward_to_inputs([model.one(x).sum()], [None], [x])
    part.run()
    plain.one(inputs(0)).sum().backward()
    assert_same_gradients(model, plain)


def test_an_input_that_is_not_used_has_no_gradient(size: str) -> None:
    model, used, unused = fresh(), inputs(0).requires_grad_(), inputs(1).requires_grad_()
    found, part = backward_to_inputs([model.one(used)], [torch.ones(3, WIDTH)], [used, unused])
    part.run()
    assert found[0] is not None
    assert found[1] is None


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize("case", ["linears", "a linear layer called twice", "a norm called twice", "hooks", "a skip"])
def test_hooks_of_weights_see_whole_gradients(case: str, size: str) -> None:
    """History: a hook that doubled the gradient of a bias made four times as much of it."""
    counts: dict[bool, list[str]] = {True: [], False: []}

    def hooked(in_two: bool) -> Weights:
        model = fresh()
        for name, parameter in model.named_parameters():

            def before(gradient: Tensor, name: str = name) -> Tensor:
                counts[in_two].append(f"before {name}")
                return gradient * 2

            def after(parameter: Tensor, name: str = name) -> None:
                counts[in_two].append(f"after {name}")

            parameter.register_hook(before)
            parameter.register_post_accumulate_grad_hook(after)
        return model

    model, plain = hooked(True), hooked(False)
    for microbatch in range(2):
        x, same = inputs(microbatch).requires_grad_(), inputs(microbatch).requires_grad_()
        torch.autograd.backward(*made(CASES[case], plain, same))
        (found,), part = backward_to_inputs(*made(CASES[case], model, x), [x])
        part.run()
        torch.testing.assert_close(found, same.grad, atol=TOLERANCE, rtol=TOLERANCE)
    assert_same_gradients(model, plain)
    assert sorted(counts[True]) == sorted(counts[False])


def test_hooks_of_modules_may_change_gradients(size: str) -> None:
    def hooked() -> Weights:
        model = fresh()
        model.one.register_full_backward_hook(lambda module, found, given: (found[0] * 3,))
        model.one.register_full_backward_pre_hook(lambda module, given: (given[0] * 5,))
        return model

    model, plain = hooked(), hooked()
    x, same = inputs(0).requires_grad_(), inputs(0).requires_grad_()
    torch.autograd.backward(*made(CASES["linears"], plain, same))
    (found,), part = backward_to_inputs(*made(CASES["linears"], model, x), [x])
    part.run()
    torch.testing.assert_close(found, same.grad, atol=TOLERANCE, rtol=TOLERANCE)
    assert_same_gradients(model, plain)


# ---------------------------------------------------------------- memory


class _Watched(torch.autograd.Function):
    """Keeps a tensor for its backward pass, which the test watches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, watch: list[Any]) -> Tensor:
        kept = x.clone()
        watch.append(weakref.ref(kept))
        ctx.kept = kept
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], (grads[0] * ctx.kept).sum(0), None


def test_the_second_part_frees_memory(size: str) -> None:
    model, x, watch = fresh(), inputs(0).requires_grad_(), []
    y = _Watched.apply(_Watched.apply(x, model.vector, watch), model.norm.weight, watch)
    _, part = backward_to_inputs([y], [torch.ones_like(y)], [x])
    del y
    assert all(kept() is not None for kept in watch) == (size == "large"), "small ones are done with"
    part.run()
    assert all(kept() is None for kept in watch)
    assert not part.junctions


def test_dropping_the_second_part_frees_memory(size: str) -> None:
    model, x, watch = fresh(), inputs(0).requires_grad_(), []
    y = _Watched.apply(x, model.vector, watch)
    _, part = backward_to_inputs([y], [torch.ones_like(y)], [x])
    del y, part
    assert watch[0]() is None


def test_memory_is_given_back_from_weight_to_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_backward, "SMALL", 0)
    model, x, watch = fresh(), inputs(0).requires_grad_(), []
    y = _Watched.apply(_Watched.apply(x, model.vector, watch), model.norm.weight, watch)
    _, part = backward_to_inputs([y], [torch.ones_like(y)], [x])
    del y
    alive: list[list[bool]] = []
    model.vector.register_hook(lambda gradient: alive.append([kept() is not None for kept in watch]))
    part.run()
    assert alive == [[True, False]], "the later node was let go of before the earlier one ran"
