"""A model whose wiring is written down by hand, for what no tracer understands: each module is a leaf.

    Wired("x, mask", [
        ("embed", Embed(), "x -> h"),
        ("block", Block(), "h, mask -> h, skip"),
        ("head", Head(), "h, skip -> y"),
    ])

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

    inputs:  the names of forward's arguments, "x, mask".
    entries: (name, module, "the values it takes -> the values it returns"), in the order of the calls. A module that
             returns several values returns a tuple or list of as many. A name may be given anew, as h above.
    result:  the names of what forward returns: one value, or several as a tuple. Default: those of the last entry.

    Raises ModelError for a wiring that does not hold together.
    """

    def __init__(self, inputs: str, entries: Sequence[Entry], result: str | None = None) -> None:
        graph = fx.Graph()
        arguments = _names(inputs, "inputs")
        values: dict[str, Any] = {name: graph.placeholder(name) for name in arguments}
        unused = dict.fromkeys(arguments, "the inputs")
        modules: dict[str, nn.Module] = {}
        last = arguments
        for entry in entries:
            name, module, takes, last = _checked(entry, modules)
            modules[name] = module
            for value in takes:
                unused.pop(value, None)
            found: Any = graph.call_module(name, tuple(_known(value, values, f"{name!r} takes") for value in takes))
            if len(last) > 1:
                found = graph.call_function(_values_of, (found, name, len(last)))
            for index, value in enumerate(last):
                _check_used({value: unused[value]} if value in unused else {})
                values[value] = graph.call_function(operator.getitem, (found, index)) if len(last) > 1 else found
                unused[value] = repr(name)
        if not modules:
            raise ModelError(f"Wired({inputs!r}, []): found no modules, needed at least one")
        returned = last if result is None else _names(result, "result")
        made = [_known(value, values, "the result names") for value in returned]
        for value in returned:
            unused.pop(value, None)
        _check_used(unused)
        graph.output(made[0] if len(made) == 1 else tuple(made))
        super().__init__(modules, graph, "Wired")
        type(self).__name__ = "Wired"  # torch.fx makes a class of its own for each graph


def _values_of(found: Any, name: str, count: int) -> Any:
    """What a module returns, which must be several values."""
    if isinstance(found, fx.Proxy):
        return found.tracer.create_proxy("call_function", _values_of, (found, name, count), {})
    if not isinstance(found, tuple | list) or len(found) != count:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        raise ModelError(f"Wired: the module {name!r} returned {what}, needed a tuple of {count}, as wired")
    return found


def _checked(entry: Any, earlier: dict[str, nn.Module]) -> tuple[str, nn.Module, list[str], list[str]]:
    """The name, the module, and the names of the values that it takes and returns."""
    needed = 'needed (name, module, "values it takes -> values it returns")'
    if not isinstance(entry, tuple | list) or [isinstance(part, str) for part in entry] != [True, False, True]:
        raise ModelError(f"Wired: found the entry {entry!r}, {needed}")
    name, module, wire = entry
    if not isinstance(module, nn.Module):
        raise ModelError(f"Wired: found a {type(module).__name__} as {name!r}, {needed}")
    if name in earlier or not _is_name(name) or hasattr(fx.GraphModule, name) or name == "training":
        why = "stands there twice" if name in earlier else "cannot be the name of a module"
        raise ModelError(f"Wired: the name {name!r} {why}, needed another one for each module, as Python names things")
    if wire.count("->") != 1:
        raise ModelError(f"Wired: found {wire!r} for {name!r}, {needed}")
    takes, returns = wire.split("->")
    returned = _names(returns, f"what {name!r} returns")
    return name, module, _names(takes, f"what {name!r} takes", may_repeat=True), returned


def _names(text: str, what: str, *, may_repeat: bool = False) -> list[str]:
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else []
    wrong = [name for name in names if not _is_name(name)]
    twice = [] if may_repeat else [name for name in names if name != "_" and names.count(name) > 1]
    if not names or wrong or twice:
        raise ModelError(f'Wired: found {text!r} for {what}, needed names with commas between, such as "x, mask"')
    return names


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _known(value: str, values: dict[str, Any], who: str) -> Any:
    if value not in values:
        raise ModelError(f"Wired: {who} {value!r}, which nothing before it makes; {near_names(value, values)}")
    return values[value]


def _check_used(unused: dict[str, str]) -> None:
    for value, maker in unused.items():
        if value == "_":
            continue
        raise ModelError(
            f"Wired: nothing takes {value!r}, which comes from {maker}: take it somewhere, name it in result=, or call "
            "it _ where a module returns what nobody needs"
        )
