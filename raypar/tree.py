"""Nested tuples, lists and dicts of tensors, taken apart and put together.

The one place that touches `torch.utils._pytree`: torch has no public name for it yet, and its registry is
what knows the output classes of other libraries (transformers' `ModelOutput`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

Tree = Any
"""A tensor, or a nested tuple, list, dict or registered class of tensors and plain values."""

Structure = _pytree.TreeSpec


def like_dict(cls: type[dict[str, Any]]) -> type[Any]:
    """Let trees hold instances of a class of dicts, which torch takes for leaves otherwise."""
    _pytree.register_pytree_node(
        cls, lambda d: (list(d.values()), list(d)), lambda values, keys: cls(zip(keys, values, strict=True))
    )
    return cls


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves of a tree, and the structure that `unflatten` needs to put them together again."""
    return _pytree.tree_flatten(tree)


def unflatten(leaves: list[Any], structure: Structure) -> Tree:
    return _pytree.tree_unflatten(leaves, structure)


def pack(structure: Structure, also: Any) -> bytes:
    """A structure and something else, pickled. torch's own class warns when it is unpickled, so a tree of
    that structure goes instead."""
    return pickle.dumps((unflatten(list(range(structure.num_leaves)), structure), also))


def unpack(packed: bytes) -> tuple[Structure, Any]:
    """What `pack` was given."""
    tree, also = pickle.loads(packed)
    return flatten(tree)[1], also


def leaves(tree: Tree) -> list[Any]:
    return _pytree.tree_leaves(tree)


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Tree) -> Tree:
    """The same tree with each tensor replaced; other leaves stay."""
    return _pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)
