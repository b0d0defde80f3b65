"""The top-level forward of a model as a graph, through torch.export: for what torch.fx cannot trace.

Only the graph is torch.export's. Its leaves are the user's own modules, called with their hooks, dropout and
train/eval mode as ever (see raypar.splitting.opaque_modules); the operations between them are recorded as torch's own.
Sizes stay variable wherever the forward lets them. Whatever it has assumed about them, a branch on a length, say, is
checked on each batch before the graph runs, so that a batch of another form is an error and never a wrong number.
"""

from __future__ import annotations

import inspect
import operator
import random
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.experimental import _config

from raypar import randomness, tree
from raypar.errors import ModelError, SplitError
from raypar.splitting.export_checks import CHECK, InputGuards, graphs_agree_for_one_row, is_same, named
from raypar.splitting.model import bind_inputs
from raypar.splitting.opaque_modules import LEAF, Call, OpaqueCalls, Slot, flat, put_back
from raypar.splitting.trace import Lost, refuse_lost_code, user_line
from raypar.tree import Structure, Tree

_ROOT = "model."


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def described(inputs: Tree) -> Tree:
    """Inputs of a model with their tensors' shapes and types instead of their values, for `export_graph`. A batch of
    one row becomes one of two: of a size of 1 nobody knows whether it may vary."""
    first = {leaf.shape[0] for leaf in tree.leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()}

    def like(tensor: torch.Tensor) -> Like:
        shape = tuple(tensor.shape)
        return Like((2, *shape[1:]) if shape and first == {1} else shape, tensor.dtype)

    return tree.map_tensors(like, inputs)


class _Root(nn.Module):
    """Calls the model as plain code does. Nothing in it is told that it is exported, since the graph must do what it
    does otherwise: transformers, say, makes a mask that nothing needs when it is."""

    def __init__(
        self,
        model: nn.Module,
        arguments: Mapping[str, Tree],
        opened: Mapping[str, nn.Module],
        keep: Callable[[Structure], None],
    ) -> None:
        super().__init__()
        self.model = model
        self.structure = tree.flatten(dict(arguments))[1]
        self.rest = [leaf for leaf in tree.leaves(dict(arguments)) if not isinstance(leaf, torch.Tensor)]
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in tree.leaves(dict(arguments))]
        self.opened = tuple(opened.items())
        self.keep = keep  # what it returns is kept outside of it: torch.export puts a module's attributes back

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        given, rest = iter(tensors), iter(self.rest)
        arguments = tree.unflatten([next(given if is_one else rest) for is_one in self.is_tensor], self.structure)
        bound = inspect.signature(self.model.forward).bind_partial()
        bound.arguments.update(arguments)
        flags = "_is_compiling_flag", "_is_exporting_flag"
        was = {flag: getattr(torch.compiler, flag) for flag in flags}
        try:
            for flag in flags:
                setattr(torch.compiler, flag, False)
            before = _attributes(self.opened)
            found, returns = tree.flatten(self.model(*bound.args, **bound.kwargs))
            for name, value in _attributes(self.opened).items():
                if name not in before or not _is_kept(before[name], value):
                    raise Lost(f"the forward changes its attribute {name!r}, which the stages would not do")
            self.keep(returns)
        finally:
            for flag, value in was.items():
                setattr(torch.compiler, flag, value)
        return tuple(found)


def _attributes(opened: tuple[tuple[str, nn.Module], ...]) -> dict[str, Any]:
    """The numbers, tensors and texts that the modules hold which the graph looks into."""
    kinds = torch.Tensor | torch.SymInt | torch.SymFloat | bool | int | float | str
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in opened
        for own in (vars(module), module._parameters, module._buffers)
        for name, value in own.items()
        if isinstance(value, kinds)
    }


def _is_kept(before: Any, now: Any) -> bool:
    return before is now or (not isinstance(now, torch.Tensor) and repr(before) == repr(now))


def export_graph(model: nn.Module, example: Tree, descend: Collection[str] = ()) -> fx.Graph:
    """The graph of `model.forward` as `trace` gives it, for inputs like `example` (see `described`).

    Raises SplitError, naming the line that cannot be exported.
    """
    found = _export(model, example, descend)
    first = found.form.tensors[0] if found.form.tensors else None
    if first is not None and first.dim() and first.shape[0] > 1 and not found.form.holds_for_one_row():
        with randomness.kept():
            _try_one_row(model, example, descend, found)
    return found.graph


def _try_one_row(model: nn.Module, example: Tree, descend: Collection[str], found: _Converter) -> None:
    """Let the graph take a single row too, where it is right for one."""
    rows = found.form.tensors[0].shape[0]

    def of_one_row(leaf: Any) -> Any:
        return Like((1, *leaf.shape[1:]), leaf.dtype) if isinstance(leaf, Like) and leaf.shape[:1] == (rows,) else leaf

    leaves, structure = tree.flatten(example)
    try:
        one = _export(model, tree.unflatten([of_one_row(leaf) for leaf in leaves], structure), descend)
    except SplitError:
        return
    if graphs_agree_for_one_row(model, found.graph, one.graph, one.calls, list(one.arguments.values())):
        found.form.for_one_row = one.form.guards


def _export(model: nn.Module, example: Tree, descend: Collection[str]) -> _Converter:
    refuse_lost_code(model, descend)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found, structure = tree.flatten(example)
    found = [torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, Like) else v for v in found]
    arguments = bind_inputs(model, tree.unflatten(found, structure))
    returned: list[Structure] = []
    opened = {"": model, **{name: operator.attrgetter(name)(model) for name in descend}}
    root, leaves = _Root(model, arguments, opened, returned.append), OpaqueCalls(model, descend)
    try:
        with randomness.kept() as before, put_back(model), leaves.recorded():
            program = _exported(root, [v for v in tree.leaves(arguments) if isinstance(v, torch.Tensor)])
            if random.getstate() != before[3] or not _are_same(np.random.get_state(), before[2]):
                raise Lost("a random number of Python or NumPy is drawn, which would be the same in every step")
            return _Converter(model, program, leaves.calls, returned[-1], arguments, device)
    except Lost as lost:
        raise SplitError(f"at {user_line(lost, model)} {lost}") from None
    except Exception as error:
        text = f"{error}".strip().split("\n\n")[0][:500]
        raise SplitError(f"at {user_line(error, model)}: {type(error).__name__}: {text}") from error


def _are_same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _exported(root: _Root, tensors: list[torch.Tensor]) -> ExportedProgram:
    """Each size that is not 1 may vary. With `backed_size_oblivious` no size is taken to be other than 1 because it is
    in the example, where the forward itself does not ask."""
    sizes = tuple({d: Dim.AUTO if size > 1 else Dim.STATIC for d, size in enumerate(t.shape)} for t in tensors)
    with warnings.catch_warnings(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        # What a leaf keeps on itself is put back, and what the forward keeps is refused.
        warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
        return export(root, tuple(tensors), dynamic_shapes=(sizes,), strict=False)


class _Converter:
    """Writes an exported program as a graph over the modules, parameters and buffers of `model`."""

    def __init__(
        self,
        model: nn.Module,
        program: ExportedProgram,
        calls: list[Call],
        returns: Structure,
        arguments: dict[str, Tree],
        device: torch.device,
    ) -> None:
        self.model = model
        self.program = program
        self.calls = calls
        self.arguments = arguments
        self.device = device
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.returned: dict[fx.Node, list[Any]] = {}
        self.inputs = {name: self.graph.placeholder(name) for name in arguments}
        # The guards have no public name. program.module() checks them too, but says neither which input nor what to do.
        self.form = InputGuards(program._guards_code, arguments)
        self.graph.call_function(named(self.form.check, CHECK), tuple(self.inputs.values()))
        self._lift(arguments)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._write(node)
            elif node.op == "output":
                self.graph.output(self._value(tree.unflatten(list(self._mapped(node.args[0])), returns)))

    def _lift(self, arguments: dict[str, Tree]) -> None:
        """What stands for the program's inputs: parameters, buffers, constants, and the tensors of the arguments."""
        signature = self.program.graph_signature
        for output in signature.output_specs:
            if output.kind is not OutputKind.USER_OUTPUT:
                raise Lost(f"the forward assigns {output.target}, needed a change in place or none")
        tensors = [
            (name, index)
            for name, value in arguments.items()
            for index, leaf in enumerate(tree.leaves(value))
            if isinstance(leaf, torch.Tensor)
        ]
        given = iter(tensors)
        nodes = (node for node in self.program.graph.nodes if node.op == "placeholder")
        for node, spec in zip(nodes, signature.input_specs, strict=True):
            is_input = spec.kind is InputKind.USER_INPUT
            where = next(given) if is_input and not isinstance(spec.arg, ConstantArgument) else None
            if not node.users:
                continue
            if where is not None:
                self.env[node] = self._tensor(*where)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.env[node] = self.graph.get_attr(str(spec.target).removeprefix(_ROOT))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.env[node] = self._constant(str(spec.target))
            else:
                raise Lost(f"the forward uses {spec.target}, a {spec.kind.name.lower()}")

    def _constant(self, target: str) -> fx.Node:
        """A tensor that is an attribute of a module, or one that forward makes of numbers."""
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
        name, index = next(
            (name, index)
            for name, value in self.arguments.items()
            for index, leaf in enumerate(tree.leaves(value))
            if isinstance(leaf, torch.Tensor)
        )
        return self.graph.call_function(getattr, (self._tensor(name, index), "device"))

    def _tensor(self, name: str, index: int) -> fx.Node:
        """One tensor of an argument."""
        whole = self.inputs[name]
        is_one = isinstance(self.arguments[name], torch.Tensor)
        return whole if is_one else self.graph.call_function(_picker(index), (whole,))

    def _write(self, node: fx.Node) -> None:
        if node.target is LEAF:
            self._write_leaf(node)
        elif isinstance(node.args[0] if node.args else None, fx.Node) and node.args[0] in self.returned:
            self.env[node] = self.returned[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            name = str(node.target).removeprefix("wrap_with_")
            raise Lost(f"code runs inside {name}, which the stages would not do: {_where(node, self.program)}")
        elif node.target is not torch.ops.aten._assert_tensor_metadata.default:  # the device that it was made on
            self.env[node] = self.graph.call_function(
                node.target,  # type: ignore[arg-type]
                self._mapped(node.args),
                self._mapped(node.kwargs),
            )

    def _write_leaf(self, node: fx.Node) -> None:
        number, tensors, sizes = node.args
        call = self.calls[number]  # type: ignore[index]
        given = {Slot.TENSOR: iter(self._mapped(tensors)), Slot.SIZE: iter(self._mapped(sizes))}
        values = [next(given[slot]) if isinstance(slot, Slot) else slot for slot in call.arguments]
        args, kwargs = tree.unflatten(values, call.structure)
        made = self.graph.call_module(
            call.name, tuple(self._value(arg) for arg in args), {name: self._value(arg) for name, arg in kwargs.items()}
        )
        if call.returns.is_leaf() and call.found == [Slot.TENSOR]:
            self.returned[node] = [made]
            return
        found = self.graph.call_function(_opener(call), (made,))
        count = sum(slot is Slot.TENSOR for slot in call.found)
        self.returned[node] = [self.graph.call_function(operator.getitem, (found, index)) for index in range(count)]

    def _mapped(self, argument: Any) -> Any:
        """An argument of the program's graph as one of ours."""

        def mapped(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return self.env[value]
            return self._device() if isinstance(value, torch.device) and value == self.device else value

        return fx.node.map_aggregate(argument, mapped)

    def _value(self, value: Any) -> Any:
        """A tree that holds nodes, as an argument of a node: of a class that a graph cannot hold it is built by one."""
        if _is_plain(value):
            return value
        found, structure = tree.flatten(value)
        is_node = [isinstance(leaf, fx.Node) for leaf in found]
        rest = [leaf for leaf in found if not isinstance(leaf, fx.Node)]

        def build(*values: Any) -> Any:
            given, others = iter(values), iter(rest)
            return tree.unflatten([next(given if is_one else others) for is_one in is_node], structure)

        nodes = tuple(leaf for leaf in found if isinstance(leaf, fx.Node))
        return self.graph.call_function(named(build, "build"), nodes)


def _where(node: fx.Node, program: ExportedProgram) -> str:
    """The line of the user's that a node with a graph inside comes from, as far as torch.export knows."""
    inner = [getattr(program.graph_module, str(arg.target)) for arg in node.all_input_nodes if arg.op == "get_attr"]
    traces = [each.stack_trace for module in inner for each in module.graph.nodes if each.stack_trace]
    return traces[0].strip().replace("\n", " ") if traces else "an unknown line"


def _is_plain(value: Any) -> bool:
    """Whether a graph holds a value as it is."""
    if type(value) in (tuple, list):
        return all(_is_plain(each) for each in value)
    if type(value) is dict:
        return all(type(key) is str and _is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, fx.Node | torch.dtype | torch.device) or type(value) in _PLAIN


_PLAIN = (bool, int, float, str)


def _picker(index: int) -> Callable[..., Any]:
    """Takes one tensor out of an argument that is a tree."""

    def pick(value: Tree) -> Any:
        return tree.leaves(value)[index]

    return named(pick, "pick")


def _opener(call: Call) -> Callable[..., Any]:
    """Takes the tensors out of what a leaf returns."""

    def open_(value: Tree) -> list[torch.Tensor]:
        found, structure = flat(value)
        alike = structure == call.returns and all(
            isinstance(leaf, torch.Tensor) if slot is Slot.TENSOR else is_same(leaf, slot)
            for leaf, slot in zip(found, call.found, strict=True)
        )
        if not alike:
            raise ModelError(
                f"the module {call.name!r} has returned something else than when the model was exported to be split: "
                f"found {_words(found)}, needed {_words(call.found)}, in the same structure. Needed a module that "
                "returns the same number of tensors each time, and the same values besides"
            )
        return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]

    return named(open_, "tensors_of")


def _words(values: list[Any]) -> str:
    return ", ".join("a tensor" if isinstance(v, torch.Tensor) or v is Slot.TENSOR else repr(v)[:50] for v in values)


def _attribute_or_none(model: nn.Module, name: str) -> Any:
    try:
        return operator.attrgetter(name)(model)
    except AttributeError:
        return None
