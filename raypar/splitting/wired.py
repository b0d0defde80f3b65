"""A model whose wiring is written down by hand, for what no tracer understands.

    Wired("x, mask", [
        ("embed", Embed(), "x -> h"),
        ("block", Block(), "h, mask -> h, skip"),
        ("head", Head(), "h, skip -> y"),
    ])

A Wired model is a torch.fx graph from the start: a stage may begin at each of its modules, and none is looked into.
The notation is that of torch_geometric.nn.Sequential (https://github.com/pyg-team/pytorch_geometric, MIT).
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from raypar.errors import ModelError, near_names

Entry = tuple[str, nn.Module, str]


class Wired(fx.GraphModule):
    """Modules that pass named values on. A stage may begin at each of them; the state dict is theirs, by their names.

        Wired("x", [("embed", Embed(), "x -> h"), ("block", Block(), "h -> h"), ("head", Head(), "h -> y")])

    inputs:  the names of forward's arguments, "x, mask".
    entries: (name, module, "the values it takes -> the values it returns"), in the order of the calls. A module that
             returns several values returns a tuple or list of as many. A later entry may reuse a name, as h above.
    result:  the names of what forward returns: one value, or several as a tuple. Default: those of the last entry.

    Raises ModelError for values that nothing makes or nothing takes, and for names that cannot be used.
    """

    def __init__(self, inputs: str, entries: Sequence[Entry], result: str | None = None) -> None:
        graph = fx.Graph()
        arguments = _names(inputs, "inputs")
        values: dict[str, Any] = {name: graph.placeholder(name) for name in arguments}
        makers = dict.fromkeys(arguments, "the inputs")  # of each value that nothing has taken yet
        modules: dict[str, nn.Module] = {}
        returns = arguments
        for entry in entries:
            name, module, takes, returns = _checked(entry, modules)
            modules[name] = module
            output: Any = graph.call_module(name, tuple(_known(value, values, f"{name!r} takes") for value in takes))
            for value in takes:
                makers.pop(value, None)
            if len(returns) > 1:
                output = graph.call_function(_values_of, (output, name, len(returns)))
            for index, value in enumerate(returns):
                _check_taken({value: makers[value]} if value in makers else {})
                values[value] = graph.call_function(operator.getitem, (output, index)) if len(returns) > 1 else output
                makers[value] = repr(name)
        if not modules:
            raise ModelError(f"Wired({inputs!r}, []): found no modules, needed at least one")
        names = returns if result is None else _names(result, "result")
        outputs = [_known(value, values, "the result names") for value in names]
        for value in names:
            makers.pop(value, None)
        _check_taken(makers)
        graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        super().__init__(modules, graph, "Wired")
        type(self).__name__ = "Wired"  # torch.fx makes a class of its own for each graph


def _values_of(output: Any, name: str, count: int) -> Any:
    """What a module returns, which must be several values."""
    if isinstance(output, fx.Proxy):
        return output.tracer.create_proxy("call_function", _values_of, (output, name, count), {})
    if not isinstance(output, tuple | list) or len(output) != count:
        kind = f"{len(output)} values" if isinstance(output, tuple | list) else type(output).__name__
        raise ModelError(f"Wired: the module {name!r} returned {kind}, needed a tuple of {count}, as wired")
    return output


def _checked(entry: Any, earlier: dict[str, nn.Module]) -> tuple[str, nn.Module, list[str], list[str]]:
    """The name, the module, and the names of the values that it takes and returns."""
    needed = 'needed (name, module, "values it takes -> values it returns")'
    if not isinstance(entry, tuple | list) or [isinstance(item, str) for item in entry] != [True, False, True]:
        raise ModelError(f"Wired: found the entry {entry!r}, {needed}")
    name, module, wire = entry
    if not isinstance(module, nn.Module):
        raise ModelError(f"Wired: found a {type(module).__name__} as {name!r}, {needed}")
    if name in earlier or not _is_name(name) or hasattr(fx.GraphModule, name) or name == "training":
        reason = "stands there twice" if name in earlier else "cannot be the name of a module"
        raise ModelError(
            f"Wired: the name {name!r} {reason}, needed another one for each module, as Python names things"
        )
    if wire.count("->") != 1:
        raise ModelError(f"Wired: found {wire!r} for {name!r}, {needed}")
    takes, returns = wire.split("->")
    returned = _names(returns, f"what {name!r} returns")
    return name, module, _names(takes, f"what {name!r} takes", may_repeat=True), returned


def _names(text: str, subject: str, *, may_repeat: bool = False) -> list[str]:
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else []
    wrong = [name for name in names if not _is_name(name)]
    twice = [] if may_repeat else [name for name in names if name != "_" and names.count(name) > 1]
    if not names or wrong or twice:
        raise ModelError(f'Wired: found {text!r} for {subject}, needed names with commas between, such as "x, mask"')
    return names


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _known(value: str, values: dict[str, Any], user: str) -> Any:
    if value not in values:
        raise ModelError(f"Wired: {user} {value!r}, which nothing before it makes; {near_names(value, values)}")
    return values[value]


def _check_taken(makers: dict[str, str]) -> None:
    for value, maker in makers.items():
        if value == "_":
            continue
        raise ModelError(
            f"Wired: nothing takes {value!r}, which comes from {maker}: take it somewhere, name it in result=, or call "
            "it _ where a module returns what nobody needs"
        )
