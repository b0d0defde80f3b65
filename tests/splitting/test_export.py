"""The graph of a forward by torch.export: it calls the user's modules, and no batch gives a wrong number."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from raypar.errors import ModelError, SplitError
from raypar.splitting.export import described, export_graph
from raypar.splitting.graph import graph_of
from raypar.splitting.model import Split, call
from raypar.splitting.trace import module_calls

ROWS = torch.rand(4, 6)


def exported(model: nn.Module, inputs: Any = ROWS, opened: tuple[str, ...] = ()) -> fx.GraphModule:
    return fx.GraphModule(model, export_graph(model, described(inputs), opened))


def ops(graph: fx.Graph) -> list[str]:
    """What a graph calls, in order, without the check of the batch."""
    called = [node.target for node in graph.nodes if node.op.startswith("call_")]
    return [str(target) if isinstance(target, str) else target.__name__ for target in called][1:]


class Branching(nn.Module):
    """What torch.fx does not trace: a branch on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if x.shape[1] > 3:
            y = y.relu()
        return self.b(y)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- the graph


def test_a_graph_has_the_form_of_one_of_torch_fx() -> None:
    class Uses(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))
            self.register_buffer("shift", torch.ones(6), persistent=False)
            self.plain = torch.full((6,), 3.0)

        def forward(self, x: Tensor, unused: Tensor | None = None) -> Tensor:
            return super().forward(x) * self.scale + self.shift - self.plain

    graph = export_graph(Uses(), described(ROWS))
    assert [str(node.target) for node in graph.nodes if node.op == "placeholder"] == ["x"]
    assert {str(node.target) for node in graph.nodes if node.op == "get_attr"} == {"scale", "shift", "plain"}
    assert ops(graph) == ["a", "relu.default", "b", "mul.Tensor", "add.Tensor", "sub.Tensor"]


def test_which_modules_are_opened() -> None:
    """Sequentials and the named ones."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), Branching()))
            self.blocks = nn.ModuleList([Branching(), Branching()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            for block in self.blocks:
                x = block(x)
            return self.blocks[0].a(x)  # type: ignore[no-any-return, union-attr, operator]

    model = Nested()
    found = module_calls(export_graph(model, described(ROWS)))
    assert found == ["body.0", "body.1.0", "body.1.1", "blocks.0", "blocks.1", "blocks.0.a"]
    found = module_calls(export_graph(model, described(ROWS), ["body.1.1", "blocks.0"]))
    assert found == ["body.0", "body.1.0", "body.1.1.a", "body.1.1.b", "blocks.0.a", "blocks.0.b", "blocks.1"]


class Pair(NamedTuple):
    one: Tensor
    other: Tensor | None


class MakesMany(nn.Module):
    def forward(self, x: Tensor, options: dict[str, Any], *, pair: Pair | None = None) -> dict[str, Any]:
        assert options == {"twice": True, "rows": x.shape[0]}
        y = x if pair is None else x + pair.one
        return {"value": y * 2, "rest": (x - 1, None, "name"), "pair": Pair(y, None)}


class WithTrees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.many, self.again, self.last = MakesMany(), MakesMany(), nn.Linear(6, 6)

    def forward(self, both: tuple[Tensor, dict[str, Tensor]], flip: bool, *, more: Tensor) -> Pair:
        x = both[0] + both[1]["y"]
        options = {"twice": True, "rows": x.shape[0]}
        found = self.many(x, options)
        found = self.again(found["rest"][0], options, pair=found["pair"])
        return Pair(self.last(found["value"]) * more * (-1 if flip else 1), None)


def test_trees_of_every_kind_pass_through() -> None:
    """In, between the modules, and out."""
    model = WithTrees()

    def inputs(rows: int) -> dict[str, Any]:
        return {"both": (torch.rand(rows, 6), {"y": torch.rand(rows, 6)}), "flip": True, "more": torch.rand(rows, 1)}

    code = exported(model, inputs(4))
    for rows in (4, 2, 7, 1):
        given = inputs(rows)
        found = call(code, given)
        assert type(found) is Pair
        assert torch.equal(found.one, call(model, given).one)
        assert found.other is None


class TakesAll(nn.Module):
    def forward(self, x: Tensor, factors: list[Tensor], constant: Tensor, size: torch.Size) -> tuple[Any, ...]:
        return sum(factors) * x + constant, size, factors[0]


class HandsOver(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TakesAll()
        self.weights = nn.ParameterList([torch.rand(6), torch.rand(6)])
        self.plain = torch.rand(6)

    def forward(self, x: Tensor) -> tuple[Tensor, nn.Parameter]:  # type: ignore[override]
        constant = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        y, size, weight = self.inner(super().forward(x), [*self.weights, self.plain], constant, torch.Size([3, 4]))
        return y * size[1] * weight, self.weights[0]


def test_what_modules_may_be_passed() -> None:
    """Parameters, constants, lists and sizes."""
    model = HandsOver()
    found, weight = exported(model)(ROWS)
    assert torch.equal(found, model(ROWS)[0])
    assert weight is model.weights[0]


def test_modules_keep_hooks_dropout_and_mode() -> None:
    """The graph calls the user's own modules."""

    class Dropped(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))  # type: ignore[no-any-return]

    model, fired = Dropped(), []
    model.a.register_forward_pre_hook(lambda *_: fired.append("before"))
    model.a.register_forward_hook(lambda module, inputs, output: fired.append("after") or output * 3)
    code = exported(model)
    assert fired == []
    torch.manual_seed(1)
    found = code(ROWS)
    assert fired == ["before", "after"]
    torch.manual_seed(1)
    assert torch.equal(found, model(ROWS))
    assert bool((found == 0).any())
    model.drop.eval()
    assert not bool((code(ROWS) == 0).any())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_in_forward_draws_in_training(
    training: bool,
) -> None:
    """Dropout that forward itself calls is in the graph of training alone, and draws in each run."""

    class Noisy(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(super().forward(x), 0.5, self.training)
            return y + torch.randn(6) if self.training else y

    model = Noisy().train(training)
    code = exported(model)
    torch.manual_seed(1)
    found = [code(ROWS), code(ROWS)]
    torch.manual_seed(1)
    assert torch.equal(torch.stack(found), torch.stack([model(ROWS), model(ROWS)]))
    assert torch.equal(*found) is not training


def test_buffers_are_read_in_each_step() -> None:
    """What is computed from a buffer is computed in each step, and a buffer that is changed in place is changed."""

    class Averages(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))  # type: ignore[operator]
            return super().forward(x - self.mean)

    model, plain = Averages(), Averages()
    plain.load_state_dict(model.state_dict())
    code = exported(model)
    assert torch.equal(model.get_buffer("mean"), torch.zeros(6))
    for _ in range(2):
        assert torch.equal(code(ROWS), plain(ROWS))
    assert torch.equal(model.get_buffer("mean"), plain.get_buffer("mean"))


def test_a_module_that_works_in_place_stays() -> None:
    """Though nobody uses what it returns."""

    class InPlace(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.relu(y)
            return y

    model = InPlace()
    assert torch.equal(exported(model)(ROWS), model(ROWS))


def test_a_graph_runs_on_another_device() -> None:
    """Than the one it was made on."""

    class Makes(Branching):
        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * torch.tensor([0.5], device=x.device)
            return super().forward(x + places.to(x.device, x.dtype))

    model = Makes()
    graph = export_graph(model, described(ROWS))
    assert torch.equal(fx.GraphModule(model, graph)(ROWS), model(ROWS))
    assert fx.GraphModule(model.to("meta"), graph)(ROWS.to("meta")).device.type == "meta"
    again = export_graph(model, described(ROWS))  # the weights have no values: nor are they asked for
    assert module_calls(again) == module_calls(graph) == ["a", "b"]


def test_gradients_are_those_of_the_model() -> None:
    model = Branching()
    exported(model)(ROWS).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(ROWS).sum().backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(found, model.parameters(), strict=True))  # type: ignore[arg-type]


# ---------------------------------------------------------------- nothing is left changed


class Remembers(nn.Module):
    """Keeps what it sees, as modules with caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.calls = 0
        self.seen: list[Any] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.last = self.norm(x)
        return self.last * random.random() * float(np.random.rand())


def test_exporting_changes_nothing() -> None:
    """Modules, buffers and random generators are as they were."""

    class Around(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Remembers()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(super().forward(x)) + torch.rand(6)

    model = Around()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    was = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    call_of = nn.Linear.__call__
    exported(model)
    assert (model.inner.calls, model.inner.seen, model.inner.last) == (0, [], None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(was[0], torch.get_rng_state())
    assert was[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert nn.Linear.__call__ is call_of
    assert "__call__" not in vars(Remembers)


def test_exporting_is_hidden_from_forward() -> None:
    told: list[bool] = []

    class Asks(Branching):
        def forward(self, x: Tensor) -> Tensor:
            told.append(torch.compiler.is_exporting() or torch.compiler.is_compiling())
            return super().forward(x)

    exported(Asks())
    assert told == [False]


# ---------------------------------------------------------------- batches that do not fit


def test_rows_and_lengths_may_differ() -> None:
    """From batch to batch, and from the example."""

    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            rows, length = words.shape
            x = self.embed(words) * mask[:, :, None] if length > 0 else self.embed(words)
            return self.head(x.view(rows * length, -1)).view(rows, length, 2)  # type: ignore[no-any-return]

    model = Lengths()
    for first in ((4, 4), (1, 4), (2, 2)):
        code = exported(model, (torch.zeros(first, dtype=torch.int64), torch.ones(first)))
        for size in ((4, 4), (3, 7), (1, 5), (5, 2)):
            words, mask = torch.randint(0, 9, size), torch.rand(size)
            assert torch.equal(code(words, mask), model(words, mask))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(4, 3), r"x is of shape \(4, 3\), and the forward was traced for .*x\.shape\[1\]"),
        (torch.rand(7, 6), r"x is of shape \(7, 6\), and the forward was traced for x\.shape\[0\] != 7"),
        (torch.rand(4, 6, 1), r"x has 3 dimensions of torch\.float32, in example_inputs 2 of torch\.float32"),
        (torch.ones(4, 6, dtype=torch.int64), r"x has 2 dimensions of torch\.int64, in example_inputs 2"),
    ],
)
def test_a_batch_that_breaks_a_guard_is_refused(batch: Tensor, message: str) -> None:
    """The forward would treat it differently."""

    class Sevens(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x) if x.shape[0] == 7 else super().forward(x)

    code = exported(Sevens())
    with pytest.raises(ModelError, match=f"does not fit the graph by which .*: {message}.*Needed: example_inputs like"):
        code(batch)
    code(torch.rand(1, 6))


class AsksForOne(nn.Module):
    """Asks whether there is one row, as what makes masks does; `needs` says when that makes a difference."""

    def __init__(self, needs: Callable[[int], bool]) -> None:
        super().__init__()
        self.needs = needs
        self.a, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)[None, :, None]
        if x.shape[0] != 1:
            place = place.expand(x.shape[0], -1, -1)
        elif self.needs(x.shape[1]):
            place = place + 1
        return self.b(self.a(x * place).mT).sum(-1)  # type: ignore[no-any-return]


def test_one_row_where_it_makes_no_difference() -> None:
    """A forward may ask whether there is one row, if the answer makes no difference to what it computes."""
    model = AsksForOne(lambda length: length > 5)
    with pytest.raises(ModelError, match=r"x is of shape \(1, 9, 6\), .* was traced for .*x\.shape\[0\] != 1"):
        exported(model, torch.rand(4, 9, 6))(torch.rand(1, 9, 6))
    code = exported(model, torch.rand(4, 3, 6))
    for size in ((1, 3, 6), (1, 5, 6), (3, 9, 6)):
        x = torch.rand(size)
        assert torch.equal(code(x), model(x))
    with pytest.raises(ModelError, match=r"x is of shape \(1, 9, 6\), .* was traced for .*x\.shape\[1\]"):
        code(torch.rand(1, 9, 6))


def test_a_size_of_one_in_the_example_stays_one() -> None:
    class Adds(Branching):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + bias

    code = exported(Adds(), (ROWS, torch.rand(1, 6)))
    code(torch.rand(5, 6), torch.rand(1, 6))
    with pytest.raises(ModelError, match=r"bias is of shape \(5, 6\), in example_inputs \(1, 6\)"):
        code(torch.rand(5, 6), torch.rand(5, 6))


def test_another_plain_value_is_refused() -> None:
    """Than in the example."""
    inputs = {"both": (ROWS, {"y": ROWS}), "flip": True, "more": torch.rand(4, 1)}
    code = exported(WithTrees(), inputs)
    with pytest.raises(ModelError, match="it holds False, in example_inputs that was True"):
        code(**inputs | {"flip": False})
    with pytest.raises(ModelError, match="its tensors stand in another structure"):
        code(**inputs | {"both": [ROWS, {"y": ROWS}]})


def test_another_structure_returned_is_refused() -> None:
    """A module must return what it did when the model was exported."""

    class Sometimes(nn.Module):
        both = True

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return x, x if self.both else None

    class Around(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sometimes()

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.inner(super().forward(x))
            return one + other  # type: ignore[no-any-return]

    model = Around()
    code = exported(model)
    code(ROWS)
    model.inner.both = False
    with pytest.raises(ModelError, match=r"the module 'inner' has returned something .*: found a tensor, None, need"):
        code(ROWS)


# ---------------------------------------------------------------- what is refused


class LooksAtValues(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x  # looks


class DrawsFromNumPy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.random.rand())


class WithoutGradient(Branching):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        return super().forward(x)


class WithoutGradientBetween(Branching):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x * 2
        return super().forward(x)


class Counts(Branching):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Replaces(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0)
        return super().forward(x - self.mean)


class Keeps(Branching):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class InstallsHooks(Branching):
    def forward(self, x: Tensor) -> Tensor:
        self.a.register_forward_hook(lambda *_: None)
        return super().forward(x)


class GivesObject(Branching):
    def forward(self, x: Tensor) -> Tensor:
        self.b(x, object())
        return x


class TellsSize(Branching):
    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x, x.shape[0]

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Leaf()

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.inner(super().forward(x))
        return y / rows  # type: ignore[no-any-return]


class LeafLooks(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.inner = LooksAtValues()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(super().forward(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (LooksAtValues, r'"return super\(\)\.forward\(x\) if x\.sum\(\) > 0 else x  # looks": GuardOnDataDep'),
        (LeafLooks, r'x\.sum\(\) > 0 else x  # looks": GuardOnDataDep'),
        (DrawsFromNumPy, "a random number of Python or NumPy is drawn"),
        (WithoutGradient, r'"x = self\.a\(x\)" code runs inside a change of torch\'s grad mode'),
        (WithoutGradientBetween, r"code runs inside set_grad_enabled.*x = x \* 2"),
        (Counts, "the forward changes its attribute 'calls'"),
        (Replaces, "the forward changes its attribute 'mean'"),
        (Keeps, "the forward changes its attribute 'last'"),
        (InstallsHooks, "the forward installs hooks on its modules"),
        (GivesObject, r'"self\.b\(x, object\(\)\)" a module gets a value of type object, needed tensors, plain values'),
        (TellsSize, "the module 'inner' returns a number that depends on the shape"),
    ],
)
def test_what_a_graph_would_lose_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    with pytest.raises(SplitError, match=message):
        export_graph(model, described(ROWS))
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_that_would_be_lost_are_refused() -> None:
    """On the model itself and on opened modules."""
    model = nn.Sequential(Branching())
    model[0].register_forward_hook(lambda *_: None)
    export_graph(model, described(ROWS))
    with pytest.raises(SplitError, match="its module '0', which must be opened to split inside it, has hooks"):
        export_graph(model, described(ROWS), ["0"])


# ---------------------------------------------------------------- when torch.fx fails


def test_torch_fx_comes_first() -> None:
    """torch.export follows, if there is an example."""
    straight = graph_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), Split(example=described(ROWS)))
    assert [str(node.target) for node in straight.nodes] == ["input", "0", "1", "output"]
    model = Branching()
    assert module_calls(graph_of(model, Split(arguments=("x",), example=described(ROWS)))) == ["a", "b"]
    with pytest.raises(SplitError, match=r"torch\.fx could not trace .*x\.shape\[1\] > 3.*With parallelize\(exam"):
        graph_of(model, Split(arguments=("x",)))


def test_what_neither_can_trace_is_refused() -> None:
    """The error names both lines, and what to do."""
    with pytest.raises(SplitError) as caught:
        graph_of(LooksAtValues(), Split(arguments=("x",), example=described(ROWS)))
    message = str(caught.value)
    line = LooksAtValues.forward.__code__.co_firstlineno + 1
    assert re.findall(rf"{re.escape(__file__)}:(\d+)", message) == [str(line)] * 2
    assert "torch.fx could not trace" in message
    assert "torch.export, tried next, fails too" in message
    assert "wire the modules by hand (raypar.Wired), or set pipeline=1" in message


def test_export_is_not_tried_in_vain() -> None:
    with pytest.raises(SplitError, match="its forward changes its attribute 'calls'") as caught:
        graph_of(CountsOnly(), Split(arguments=("x",), example=described(ROWS)))
    assert "torch.export" not in str(caught.value)


class CountsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) / self.calls  # type: ignore[no-any-return]


def test_an_example_is_small() -> None:
    """Whatever the size of its tensors."""
    example = described({"x": torch.zeros(100, 1000), "flag": True})
    assert len(pickle.dumps(example)) < 500
    assert pickle.loads(pickle.dumps(example)) == example
