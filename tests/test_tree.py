from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch

from raypar import tree

Pair = namedtuple("Pair", ["left", "right"])

EXAMPLES = [
    torch.zeros(2),
    (torch.zeros(2), [torch.ones(1), {"mask": torch.zeros(3), "scale": 2.0}]),
    {"b": torch.zeros(1), "a": None},
    Pair(torch.zeros(1), "text"),
    OrderedDict(x=torch.zeros(1)),
    (),
    None,
]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)


@each_example
def test_what_is_taken_apart_is_put_together_again(example: Any):
    leaves, structure = tree.flatten(example)
    again = tree.unflatten(leaves, structure)
    assert type(again) is type(example)
    assert tree.flatten(again)[1] == structure
    assert all(one is other for one, other in zip(tree.leaves(again), leaves, strict=True))


@each_example
def test_a_structure_survives_packing(example: Any):
    """Without a warning of torch."""
    structure = tree.flatten(example)[1]
    again, also = tree.unpack(tree.pack(structure, ("shapes", (2, 3))))
    assert again == structure
    assert also == ("shapes", (2, 3))


def test_the_leaves_come_in_the_order_of_the_tree():
    assert tree.leaves((1, [2, {"a": 3}], 4)) == [1, 2, 3, 4]


def test_map_tensors_replaces_only_tensors():
    mapped = tree.map_tensors(lambda t: t + 1, {"x": torch.zeros(2), "n": 3, "deep": (torch.ones(1), None)})
    assert mapped["x"].tolist() == [1, 1]
    assert mapped["deep"][0].tolist() == [2]
    assert (mapped["n"], mapped["deep"][1]) == (3, None)


def test_structures_of_different_trees_differ():
    forms: list[Any] = [1, (1,), [1], {"a": 1}, {"b": 1}, (1, 1), Pair(1, 1)]
    structures = [tree.flatten(form)[1] for form in forms]
    assert all(one != other for i, one in enumerate(structures) for other in structures[:i])


@each_example
def test_a_tree_is_the_same_as_its_copy(example: Any):
    assert tree.same(example, tree.map_tensors(torch.clone, example))


NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(1), torch.ones(2), False),
        (torch.ones(1), 1.0, False),
        (1, True, False),
        ((1, "a"), (1, "a"), True),
        ((1, "a"), [1, "a"], False),
        ({"a": 1}, {"b": 1}, False),
        (None, 0, False),
    ],
)
def test_trees_that_are_the_same(one: Any, other: Any, are_same: bool):
    assert tree.same(one, other) == are_same
    assert tree.same(other, one) == are_same
