"""Nested tuples, lists and dicts of tensors, taken apart and put together.

The only module that uses `torch.utils._pytree`: torch has no public name for it yet, and its registry knows the output
classes of other libraries (transformers' `ModelOutput`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

Tree = Any
"""A tensor, or a nested tuple, list, dict or registered class of tensors and plain values."""

Structure = _pytree.TreeSpec


def like_dict(cls: type[dict[str, Any]]) -> type[Any]:
    """Register a subclass of dict as a node of trees: torch treats its instances as leaves otherwise."""
    _pytree.register_pytree_node(
        cls, lambda d: (list(d.values()), list(d)), lambda values, keys: cls(zip(keys, values, strict=True))
    )
    return cls


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves of a tree, and the structure from which `unflatten` rebuilds it."""
    return _pytree.tree_flatten(tree)


def unflatten(leaves: list[Any], structure: Structure) -> Tree:
    return _pytree.tree_unflatten(leaves, structure)


@dataclass(frozen=True)
class Flat:
    """A tree that was taken apart once, so that what is done to each leaf needs no walk of its own."""

    leaves: list[Any]
    structure: Structure

    @staticmethod
    def of(tree: Tree) -> Flat:
        return Flat(*flatten(tree))

    def map(self, function: Callable[[Any], Any]) -> Flat:
        """The same tree with each leaf replaced."""
        return Flat([function(leaf) for leaf in self.leaves], self.structure)

    def tree(self) -> Tree:
        return unflatten(self.leaves, self.structure)

    def __reduce__(self) -> tuple[Any, ...]:
        return Flat.of, (self.tree(),)  # torch's own class of structures warns when it is unpickled


def pack(structure: Structure, also: Any) -> bytes:
    """A structure and another value, pickled. A tree of that structure stands for it, since torch's own class warns
    when it is unpickled."""
    return pickle.dumps((unflatten(list(range(structure.num_leaves)), structure), also))


def unpack(packed: bytes) -> tuple[Structure, Any]:
    """The structure and the value that `pack` was given."""
    tree, also = pickle.loads(packed)
    return flatten(tree)[1], also


def leaves(tree: Tree) -> list[Any]:
    return _pytree.tree_leaves(tree)


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Tree) -> Tree:
    """The same tree with each tensor replaced by `function(tensor)`; other leaves stay."""
    return _pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def same(one: Tree, other: Tree) -> bool:
    """Whether two trees have the same structure and the same leaves: tensors of one type, shape and values, where NaN
    equals NaN; other leaves that are one object, or equal and of one type."""
    (leaves_of_one, structure), (leaves_of_other, other_structure) = flatten(one), flatten(other)
    return structure == other_structure and all(map(_same_leaf, leaves_of_one, leaves_of_other))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return bool(((one == other) | (one != one) & (other != other)).all())
    return one is other or (type(one) is type(other) and bool(one == other))
