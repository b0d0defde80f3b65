"""The top-level forward of a model as a graph, through torch.export: for what torch.fx cannot trace.

    example (shapes) ─▶ torch.export: program ─▶ convert: graph over the user's modules ─▶ allow_one_row ─▶ graph

Only the graph is torch.export's. Its modules are the user's own, called with their hooks, dropout and train/eval mode
as ever (see raypar.splitting.opaque_modules); the operations between them are recorded as torch's own. Sizes stay
variable wherever the forward lets them. Whatever torch.export has assumed about them, a branch on a length, say, is
checked on each batch before the graph runs (raypar.splitting.export_checks), so that a batch that does not fit is an
error and never a wrong number.

Traps: a program's `.module()` has no `eval()`, and an unflattened export keeps dropout on, so neither is used; export
assumes that a size which is 1 in the example stays 1; transformers' models need `strict=False`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.experimental import _config

from raypar import randomness, tree
from raypar.errors import ModelError, SplitError
from raypar.splitting.export_checks import CHECK, Exported, InputGuards, allow_one_row, named
from raypar.splitting.model import bind_inputs
from raypar.splitting.opaque_modules import OPAQUE_CALL, Call, OpaqueCalls, Root, Slot, flat, put_back
from raypar.splitting.trace import Lost, refuse_lost_code, user_line
from raypar.tree import Structure, Tree


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def described(inputs: Tree) -> Tree:
    """Inputs of a model with their tensors' shapes and types instead of their values, for `export_graph`. A batch of
    one row becomes one of two, since torch.export takes a size of 1 to be fixed."""
    rows = {leaf.shape[0] for leaf in tree.leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()}

    def like(tensor: torch.Tensor) -> Like:
        shape = tuple(tensor.shape)
        return Like((2, *shape[1:]) if shape and rows == {1} else shape, tensor.dtype)

    return tree.map_tensors(like, inputs)


def export_graph(model: nn.Module, example: Tree, opened: Collection[str] = ()) -> fx.Graph:
    """The graph of `model.forward` as `trace` gives it, for inputs like `example` (see `described`).

    Raises SplitError, naming the line that cannot be exported.
    """
    exported = _export(model, example, opened)
    allow_one_row(model, exported, lambda: _export(model, _one_row_of(example, exported.guards), opened))
    return exported.graph


def _one_row_of(example: Tree, guards: InputGuards) -> Tree:
    """The example with one row where it has as many as its first tensor."""
    rows = guards.tensors[0].shape[:1]
    leaves, structure = tree.flatten(example)
    shortened = [
        Like((1, *leaf.shape[1:]), leaf.dtype) if isinstance(leaf, Like) and leaf.shape[:1] == rows else leaf
        for leaf in leaves
    ]
    return tree.unflatten(shortened, structure)


def _export(model: nn.Module, example: Tree, opened: Collection[str]) -> Exported:
    refuse_lost_code(model, opened)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    leaves, structure = tree.flatten(example)
    values = [torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, Like) else v for v in leaves]
    arguments = bind_inputs(model, tree.unflatten(values, structure))
    structures: list[Structure] = []
    root, opaque = Root(model, arguments, opened, structures.append), OpaqueCalls(model, opened)
    with randomness.kept():
        generators = randomness.plain_state()
        try:
            with put_back(model), opaque.recorded():
                program = _program(root, [v for v in tree.leaves(arguments) if isinstance(v, torch.Tensor)])
                now = randomness.plain_state()
                if any(now[library] != generators[library] for library in ("python", "numpy")):
                    raise Lost("a random number of Python or NumPy is drawn, which would be the same in every step")
                return convert(model, program, opaque.calls, structures[-1], arguments, device)
        except Lost as lost:
            raise SplitError(f"at {user_line(lost, model)} {lost}") from None
        except Exception as error:
            text = f"{error}".strip().split("\n\n")[0][:500]
            raise SplitError(f"at {user_line(error, model)}: {type(error).__name__}: {text}") from error


def _program(root: Root, tensors: list[torch.Tensor]) -> ExportedProgram:
    """Each size that is not 1 may vary. With `backed_size_oblivious`, torch.export does not assume that a size differs
    from 1 because it does in the example, unless the forward itself asks."""
    sizes = tuple({d: Dim.AUTO if size > 1 else Dim.STATIC for d, size in enumerate(t.shape)} for t in tensors)
    with warnings.catch_warnings(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        # What an opaque module keeps on itself is put back, and what the forward keeps is refused.
        warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
        return export(root, tuple(tensors), dynamic_shapes=(sizes,), strict=False)


# ---------------------------------------------------------------- an exported program as a graph over the model


def convert(
    model: nn.Module,
    program: ExportedProgram,
    calls: list[Call],
    returns: Structure,
    arguments: dict[str, Tree],
    device: torch.device,
) -> Exported:
    """Write an exported program as a graph over the modules, parameters and buffers of `model`.

    calls:     of opaque modules, by the number that stands in the program.
    returns:   the structure of forward's output.
    arguments: of forward, by name, that the program was made with; their tensors are on `device`.
    """
    # The guards have no public name. program.module() checks them too, but says neither which input nor what to do.
    guards = InputGuards(program._guards_code, arguments)
    writer = _Writer(model, program, calls, arguments, device)
    writer.graph.call_function(named(guards.check, CHECK), tuple(writer.inputs.values()))
    writer.write_inputs()
    for node in program.graph.nodes:
        if node.op == "call_function":
            writer.write(node)
        elif node.op == "output":
            writer.graph.output(writer.tree_of(tree.unflatten(list(writer.mapped(node.args[0])), returns)))
    return Exported(writer.graph, guards, calls, arguments)


class _Writer:
    """Writes the nodes of a program into `graph`. `copies` holds our value for each of its nodes, `results` the values
    that each call of an opaque module returns."""

    def __init__(
        self,
        model: nn.Module,
        program: ExportedProgram,
        calls: list[Call],
        arguments: dict[str, Tree],
        device: torch.device,
    ) -> None:
        self.model = model
        self.program = program
        self.calls = calls
        self.arguments = arguments
        self.device = device
        self.graph = fx.Graph()
        self.inputs = {name: self.graph.placeholder(name) for name in arguments}
        self.copies: dict[fx.Node, Any] = {}
        self.results: dict[fx.Node, list[Any]] = {}
        self.tensors = [
            (name, index)
            for name, value in arguments.items()
            for index, leaf in enumerate(tree.leaves(value))
            if isinstance(leaf, torch.Tensor)
        ]

    def write_inputs(self) -> None:
        """What stands for the program's inputs: parameters, buffers, constants, and the tensors of the arguments."""
        signature = self.program.graph_signature
        for output in signature.output_specs:
            if output.kind is not OutputKind.USER_OUTPUT:
                raise Lost(f"the forward assigns {output.target}, needed a change in place or none")
        tensors = iter(self.tensors)
        nodes = (node for node in self.program.graph.nodes if node.op == "placeholder")
        for node, spec in zip(nodes, signature.input_specs, strict=True):
            is_tensor = spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument)
            tensor = next(tensors) if is_tensor else None
            if not node.users:
                continue
            if tensor is not None:
                self.copies[node] = self._tensor(*tensor)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.copies[node] = self.graph.get_attr(str(spec.target).removeprefix(_ROOT))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.copies[node] = self._constant(str(spec.target))
            else:
                raise Lost(f"the forward uses {spec.target}, a {spec.kind.name.lower()}")

    def _constant(self, target: str) -> fx.Node:
        """A tensor that is an attribute of a module, or one that forward makes from numbers."""
        name = target.removeprefix(_ROOT)
        if target.startswith(_ROOT) and isinstance(_attribute_or_none(self.model, name), torch.Tensor):
            return self.graph.get_attr(name)
        value = self.program.constants[target]
        assert isinstance(value, torch.Tensor)
        if value.device != self.device:
            return self.graph.call_function(named(value.clone, "constant"))
        return self.graph.call_function(named(lambda like: value.to(like, copy=True), "constant"), (self._device(),))

    def _device(self) -> fx.Node:
        """The device that the graph runs on, which may be another one than it was made on."""
        return self.graph.call_function(getattr, (self._tensor(*self.tensors[0]), "device"))

    def _tensor(self, name: str, index: int) -> fx.Node:
        """One tensor of an argument."""
        argument = self.inputs[name]
        is_tree = not isinstance(self.arguments[name], torch.Tensor)
        return self.graph.call_function(_picker(index), (argument,)) if is_tree else argument

    def write(self, node: fx.Node) -> None:
        """Write one call of the program."""
        if node.target is OPAQUE_CALL:
            self._write_call(node)
        elif isinstance(node.args[0] if node.args else None, fx.Node) and node.args[0] in self.results:
            self.copies[node] = self.results[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            name = str(node.target).removeprefix("wrap_with_")
            raise Lost(f"code runs inside {name}, which the stages would not do: {_line_of(node, self.program)}")
        elif node.target is not torch.ops.aten._assert_tensor_metadata.default:  # the device that it was made on
            args, kwargs = self.mapped(node.args), self.mapped(node.kwargs)
            self.copies[node] = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _write_call(self, node: fx.Node) -> None:
        number, tensors, sizes = node.args
        call = self.calls[number]  # type: ignore[index]
        variables = {Slot.TENSOR: iter(self.mapped(tensors)), Slot.SIZE: iter(self.mapped(sizes))}
        values = [next(variables[slot]) if isinstance(slot, Slot) else slot for slot in call.arguments]
        args, kwargs = tree.unflatten(values, call.structure)
        returned = self.graph.call_module(
            call.name,
            tuple(self.tree_of(value) for value in args),
            {name: self.tree_of(value) for name, value in kwargs.items()},
        )
        if call.returns.is_leaf() and call.results == [Slot.TENSOR]:
            self.results[node] = [returned]
            return
        opened = self.graph.call_function(_opener(call), (returned,))
        count = sum(slot is Slot.TENSOR for slot in call.results)
        self.results[node] = [self.graph.call_function(operator.getitem, (opened, index)) for index in range(count)]

    def mapped(self, argument: Any) -> Any:
        """An argument of the program's graph as one of ours."""

        def copy_of(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return self.copies[value]
            return self._device() if isinstance(value, torch.device) and value == self.device else value

        return fx.node.map_aggregate(argument, copy_of)

    def tree_of(self, value: Any) -> Any:
        """A tree that holds nodes, as an argument of a node; if it is of a class that a graph cannot hold, a node
        builds it."""
        if _is_plain(value):
            return value
        leaves, structure = tree.flatten(value)
        is_node = [isinstance(leaf, fx.Node) for leaf in leaves]
        constants = [leaf for leaf in leaves if not isinstance(leaf, fx.Node)]

        def build(*values: Any) -> Any:
            variables, others = iter(values), iter(constants)
            return tree.unflatten([next(variables if from_node else others) for from_node in is_node], structure)

        nodes = tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node))
        return self.graph.call_function(named(build, "build"), nodes)


_ROOT = "model."
"""What the names of the model's tensors begin with in the program: its place in `Root`."""


def _line_of(node: fx.Node, program: ExportedProgram) -> str:
    """The user's line that a node with a graph inside comes from, as far as torch.export knows."""
    modules = [getattr(program.graph_module, str(arg.target)) for arg in node.all_input_nodes if arg.op == "get_attr"]
    traces = [inner.stack_trace for module in modules for inner in module.graph.nodes if inner.stack_trace]
    return traces[0].strip().replace("\n", " ") if traces else "an unknown line"


def _is_plain(value: Any) -> bool:
    """Whether a graph holds a value as it is."""
    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, fx.Node | torch.dtype | torch.device) or type(value) in _PLAIN


_PLAIN = (bool, int, float, str)


def _picker(index: int) -> Callable[..., Any]:
    """Takes one tensor out of an argument that is a tree."""

    def pick(value: Tree) -> Any:
        return tree.leaves(value)[index]

    return named(pick, "pick")


def _opener(call: Call) -> Callable[..., Any]:
    """Takes the tensors out of what a module returns."""

    def open_(value: Tree) -> list[torch.Tensor]:
        leaves, structure = flat(value)
        is_alike = structure == call.returns and all(
            isinstance(leaf, torch.Tensor) if slot is Slot.TENSOR else tree.same(leaf, slot)
            for leaf, slot in zip(leaves, call.results, strict=True)
        )
        if not is_alike:
            raise ModelError(
                f"the module {call.name!r} has returned something else than when the model was exported to be split: "
                f"found {_words(leaves)}, needed {_words(call.results)}, in the same structure. Needed a module that "
                "returns the same number of tensors each time, and the same values besides"
            )
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    return named(open_, "tensors_of")


def _words(values: list[Any]) -> str:
    return ", ".join("a tensor" if isinstance(v, torch.Tensor) or v is Slot.TENSOR else repr(v)[:50] for v in values)


def _attribute_or_none(model: nn.Module, name: str) -> Any:
    try:
        return operator.attrgetter(name)(model)
    except AttributeError:
        return None
