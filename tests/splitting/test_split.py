from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models import CNN, mlp
from raypar.errors import ModelError, SplitError
from raypar.splitting import split as module
from raypar.splitting.model import Split
from raypar.splitting.split import StageGraph, check_split, edges_of, holders, opened_for, parents_of, split_graph
from raypar.splitting.stage_code import StageCode
from raypar.splitting.trace import trace
from raypar.tree import Tree


def graphs_of(model: nn.Module, names: Sequence[str], arguments: Sequence[str] | None = None) -> list[StageGraph]:
    graph = trace(model, arguments, parents_of(model, names))
    return split_graph(graph, check_split(graph, names, len(names) + 1))


def described(graph: fx.Graph) -> list[str]:
    """What a stage computes, in order: names of modules, functions and methods."""
    called = [node.target for node in graph.nodes if node.op.startswith("call_")]
    return [str(target) if isinstance(target, str) else target.__name__ for target in called]


def run_stages(model: nn.Module, graphs: Sequence[StageGraph], inputs: Tree) -> Any:
    """The output of a model that is run stage by stage, each with nothing but what was sent to it."""
    arrived: list[dict[int, list[Any]]] = [{} for _ in graphs]
    for stage, graph in enumerate(graphs):
        assert {source: len(values) for source, values in arrived[stage].items()} == {
            source: len(names) for source, names in graph.receives.items()
        }
        found = StageCode.of_graph(model, graph).run(inputs, arrived[stage])
        made = dict(zip(graph.makes, found, strict=False))
        for target, names in graph.sends.items():
            arrived[target][stage] = [made[name] for name in names]
    return found[-1]


# ---------------------------------------------------------------- the models that are split here


class Skips(nn.Module):
    """The first module's value is used after the second and after the fourth one, the mask after the third alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        rows = x.shape[0]
        first = F.relu(self.a(x))
        second = self.b(first)
        third = self.c(second) * mask
        return {"logits": self.d(third) + first, "hidden": second, "rows": rows}


class Tower(nn.Module):
    """Blocks in a list, as transformers have them."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(TowerBlock() for _ in range(blocks))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class TowerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embed(x)))
        return logits


class UsedByHand(nn.Module):
    """Uses parameters and a buffer in forward itself, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.register_buffer("shift", torch.ones(4))
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(x)) * self.scale + self.shift, self.b.weight)


# ---------------------------------------------------------------- what goes where


def test_the_drawing_is_the_split():
    """Functional code belongs to the stage of the module before it, as the docstring draws it."""
    assert module.__doc__ is not None
    rows = re.findall(r"^ {4}(.*│.*)$", module.__doc__, re.MULTILINE)
    drawn = [cell.split() for cell in rows[0].split("│")]
    graphs = graphs_of(CNN(), ["conv2", "fc2"])
    assert [described(stage.graph) for stage in graphs] == drawn


@pytest.mark.parametrize(
    ("model", "split"),
    [
        (CNN(), ["conv2"]),
        (CNN(), ["conv2", "fc1", "fc2"]),
        (mlp(), ["3"]),
        (mlp(), ["1", "2", "3", "4", "5"]),
        (nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(784, 8)), nn.Sequential(nn.ReLU())), ["1"]),
    ],
)
def test_stages_compute_what_the_model_does(model: nn.Module, split: list[str]):
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(run_stages(model, graphs_of(model, split), images), model(images))


def test_values_go_straight_to_their_users():
    """So do inputs of the model."""
    model = Skips()
    graphs = graphs_of(model, ["b", "c", "d"])
    assert [graph.inputs for graph in graphs] == [["x"], [], ["mask"], []]
    assert edges_of(graphs) == {(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert [sorted(graph.receives) for graph in graphs] == [[], [0], [1], [0, 1, 2]]
    inputs = (torch.rand(3, 4), torch.rand(4))
    found, plain = run_stages(model, graphs, inputs), model(*inputs)
    assert torch.equal(found["logits"], plain["logits"])
    assert torch.equal(found["hidden"], plain["hidden"])
    assert found["rows"] == 3


def test_a_value_for_two_stages_is_made_once():
    """It is sent to both."""
    first = graphs_of(Skips(), ["b", "c", "d"])[0]
    assert {target: len(names) for target, names in first.sends.items()} == {1: 1, 3: 2}
    assert first.sends[1][0] in first.sends[3]
    assert sorted(first.makes) == sorted(first.sends[3])


def test_the_inputs_of_a_model_can_come_as_a_dict():
    model = Skips()
    inputs = {"mask": torch.rand(4), "x": torch.rand(3, 4)}
    found = run_stages(model, graphs_of(model, ["c"]), inputs)
    assert torch.equal(found["logits"], model(**inputs)["logits"])


def test_a_default_that_is_passed_is_used():
    """An argument with a default is used if the model was traced with it."""

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            y = self.a(x)
            return self.b(y if bias is None else y + bias)  # type: ignore[no-any-return]

    model, x, bias = Optional(), torch.rand(2, 4), torch.rand(4)
    assert torch.equal(run_stages(model, graphs_of(model, ["b"]), x), model(x))
    with_bias = graphs_of(model, ["b"], arguments=["x", "bias"])
    assert torch.equal(run_stages(model, with_bias, (x, bias)), model(x, bias))
    with pytest.raises(ModelError, match=r"forward uses its argument 'bias', which this batch lacks \(found \['x'\]\)"):
        run_stages(model, with_bias, x)


def test_a_stage_without_inputs_asks_for_none():
    codes = [StageCode.of_graph(CNN(), graph) for graph in graphs_of(CNN(), ["conv2"])]
    assert [code.uses_inputs for code in codes] == [True, False]


# ---------------------------------------------------------------- names


def test_names_may_come_in_any_order():
    model = CNN()
    graph = trace(model)
    assert check_split(graph, ["fc2", "conv2"], 3) == ["conv2", "fc2"]


def test_a_split_inside_a_list_opens_only_it():
    model = Tower()
    assert parents_of(model, ["blocks.1", "head"]) == ("blocks",)
    graphs = graphs_of(model, ["blocks.1", "head"])
    assert [described(stage.graph) for stage in graphs] == [["embed", "blocks.0"], ["blocks.1", "blocks.2"], ["head"]]


def test_a_split_inside_a_block_opens_that_block():
    model, x = Tower(), torch.rand(2, 4)
    graphs = graphs_of(model, ["blocks.1.down"])
    assert described(graphs[0].graph) == ["embed", "blocks.0", "blocks.1.up", "gelu"]
    assert torch.equal(run_stages(model, graphs, x), model(x))


def test_a_parent_begins_at_its_first_module():
    graph = trace(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))))
    assert check_split(graph, ["1"], 2) == ["1"]
    assert [described(graph.graph) for graph in split_graph(graph, ["1"])] == [["0"], ["1.0", "1.1"]]


def test_modules_are_opened_until_enough():
    """Until there is one module for each stage."""
    model = Tower(blocks=2)
    assert opened_for(model, 4, Split()) == ()
    opened = opened_for(model, 6, Split())
    assert opened == ("blocks.0", "blocks.1")
    assert [str(n.target) for n in trace(model, None, opened).nodes if n.op == "call_module"] == [
        "embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head",
    ]  # fmt: skip


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("split", "stages", "message"),
    [
        (["conv3"], 2, "the model has no module 'conv3'; did you mean 'conv2' or 'conv1'?"),
        (["zzz"], 2, "the model has no module 'zzz'; known: 'conv1', 'conv2', 'fc1', 'fc2'"),
        ("conv2", 2, "split='conv2': needed a list of module names, as in split=['conv2']"),
        (["conv2"], 3, "split=['conv2'] makes 2 stages, but the plan has 3: name 2 modules"),
        ([], 2, "split=[] makes 1 stage, but the plan has 2: name 1 module at which"),
        (["conv1"], 2, "'conv1' is the first module, so that nothing is left for the stage before it"),
        (["fc1", "fc1"], 3, "'fc1' begins at the same module as another name (fc1, fc1)"),
        (["conv2", "fc1", "fc1"], 4, "'fc1' begins at the same module as another name (fc1, fc1)"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: Any, stages: int, message: str):
    """Neither the model nor the plan."""
    model = CNN()
    with pytest.raises(SplitError, match=re.escape(message)):
        check_split(trace(model, None, parents_of(model, split)), split, stages)


def test_an_uncalled_module_begins_no_stage():
    model = UsedByHand()
    model.extra = nn.Linear(1, 1)
    with pytest.raises(SplitError, match=r"the model's forward does not call 'extra'; it calls \['a', 'b'\]"):
        check_split(trace(model), ["extra"], 2)


def test_two_names_for_the_same_module_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))))
    with pytest.raises(SplitError, match=re.escape("begins at the same module as another name (1, 1.0)")):
        check_split(trace(model), ["1", "1.0"], 3)


def test_more_stages_than_modules_are_refused():
    """The error gives both numbers."""
    with pytest.raises(
        SplitError, match=r"the plan has 5 stages, but CNN has only 4 modules .*\(conv1, conv2, fc1, fc2\)"
    ):
        opened_for(CNN(), 5, Split())
    with pytest.raises(SplitError, match=r"the plan has 7 stages, but Sequential has only 6 modules"):
        opened_for(mlp(), 7, Split())


# ---------------------------------------------------------------- who owns what


def test_a_tensor_belongs_to_its_user():
    """Every parameter and buffer belongs to the stage that uses it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    held = holders(model, [graphs_of(model, ["1", "3"])])
    owner = {name: stages[0] for name, stages in held.items()}
    assert all(len(stages) == 1 for stages in held.values())
    assert list(owner) == [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert {name: stage for name, stage in owner.items() if stage == 1} == dict.fromkeys(
        ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"], 1
    )
    assert (owner["0.weight"], owner["3.bias"]) == (0, 2)


def test_who_owns_parameters_used_by_hand():
    """A parameter that forward uses by hand belongs to the stage that uses it, an unused one to the first stage."""
    model, x = UsedByHand(), torch.rand(2, 4)
    graphs = graphs_of(model, ["b"])
    assert holders(model, [graphs]) == {
        "scale": [1], "unused": [0], "a.weight": [0], "a.bias": [0], "b.weight": [1], "b.bias": [1], "shift": [1],
    }  # fmt: skip
    assert torch.equal(run_stages(model, graphs, x), model(x))


class Masked(nn.Module):
    """Uses one buffer after each of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * self.mask) * self.mask) + self.mask  # type: ignore[no-any-return]


def test_a_shared_buffer_crosses_from_its_owner():
    """A buffer that several stages read belongs to the first of them and crosses to the others."""
    model, x = Masked(), torch.rand(2, 4)
    graphs = graphs_of(model, ["b", "c"])
    assert holders(model, [graphs])["mask"] == [0]
    assert [graph.sends for graph in graphs] == [{1: ["mask", "mul"], 2: ["mask"]}, {2: ["mul_1"]}, {}]
    assert torch.equal(run_stages(model, graphs, x), model(x))


@pytest.mark.parametrize("where", [0, 1])
def test_a_crossing_buffer_changed_in_place(where: int):
    """It is refused, whether its owner or a receiver changes it."""

    class Counts(Masked):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) * self.mask
            if where == 0:
                self.mask.mul_(0.9)
            z = self.b(y) * self.mask
            if where == 1:
                self.mask.mul_(0.9)
            return z

    model = Counts()
    graphs = graphs_of(model, ["b"])
    with pytest.raises(SplitError, match=r"a stage changes 'mask' in place .* another stage uses"):
        run_stages(model, graphs, torch.rand(2, 4))


def test_a_buffer_of_one_stage_may_change():
    class Averages(Masked):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            self.mask.mul_(0.9).add_(0.1 * y.detach().mean(0))
            return self.b(y - self.mask)  # type: ignore[no-any-return]

    model, plain, x = Averages(), Averages(), torch.rand(2, 4)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run_stages(model, graphs_of(model, ["b"]), x), plain(x))
    assert torch.equal(model.mask, plain.mask)  # type: ignore[arg-type]


def test_a_tied_parameter_has_one_owner():
    """The first stage that uses a shared parameter owns it, under all its names."""
    model = Tied()
    found = holders(model, [graphs_of(model, ["head"])])
    assert (found["embed.weight"], found["head.weight"]) == ([0], [0, 1])


def test_ties_within_a_stage_are_allowed():
    model = Tied()
    held = holders(nn.Sequential(model, nn.Linear(10, 2)), [graphs_of(nn.Sequential(model, nn.Linear(10, 2)), ["1"])])
    assert held["0.embed.weight"] == held["0.head.weight"] == [0]


def test_a_module_called_in_two_stages():
    """Both stages hold its weights, and the first one owns them."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))  # type: ignore[no-any-return]

    model = Twice()
    found = holders(model, [graphs_of(model, ["b"])])
    assert found == {"a.weight": [0, 1], "a.bias": [0, 1], "b.weight": [1], "b.bias": [1]}


def test_buffers_used_in_two_stages_are_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.b = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(x)))  # type: ignore[no-any-return]

    model = Twice()
    with pytest.raises(SplitError, match=r"'norm\.running_mean' is used by stages \[0, 1\]: a buffer must belong"):
        holders(model, [graphs_of(model, ["b"])])


def test_graphs_that_differ_by_mode():
    """What the train graph and the eval graph use in different stages is held by both stages."""

    class Differs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.b(self.a(x) * self.scale)  # type: ignore[no-any-return]
            return self.b(self.a(x)) * self.scale  # type: ignore[no-any-return]

    model = Differs()
    in_training = graphs_of(model, ["b"])
    in_eval = graphs_of(model.eval(), ["b"])
    assert holders(model, [in_training])["scale"] == [0]
    assert holders(model, [in_training, in_eval])["scale"] == [0, 1]
