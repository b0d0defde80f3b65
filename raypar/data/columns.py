"""Arrow columns as NumPy arrays, without a Python object per value."""

from __future__ import annotations

from math import prod

import numpy as np
import pyarrow as pa


def item_shape(kind: pa.DataType) -> tuple[int | None, ...] | None:
    """The shape of one row's value, with None for a list of any length; None for a type that is not a tensor."""
    shape: list[int | None] = []
    while True:
        if isinstance(kind, pa.FixedShapeTensorType):
            shape += [kind.shape[axis] for axis in _axes(kind)]
            kind = kind.value_type
        elif pa.types.is_fixed_size_list(kind):
            shape.append(kind.list_size)
            kind = kind.value_type
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            shape.append(None)
            kind = kind.value_type
        else:
            fits = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            return tuple(shape) if fits else None


def value_bytes(kind: pa.DataType) -> int:
    """The bytes of one number of a column in memory."""
    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_nested(kind):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return max(1, int(kind.bit_width) // 8)


def to_array(array: pa.Array) -> np.ndarray:
    """A column as an array, one row per example. Raises ValueError for nulls and for lists of different lengths."""
    rows, shape, axes = len(array), [], [0]
    while True:
        if array.null_count:
            raise ValueError(f"has {array.null_count} nulls; fill them or drop these rows")
        kind = array.type
        if isinstance(kind, pa.FixedShapeTensorType):
            axes += [len(axes) + axis for axis in _axes(kind)]
            shape += kind.shape
            array = array.storage.flatten()
        elif pa.types.is_fixed_size_list(kind):
            axes.append(len(axes))
            shape.append(kind.list_size)
            array = array.flatten()
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            axes.append(len(axes))
            shape.append(_length(array))
            array = array.flatten()
        else:
            values: np.ndarray = array.to_numpy(zero_copy_only=False)
            return values.reshape(rows, *shape).transpose(axes)


def _length(array: pa.Array) -> int:
    """The length that all lists have."""
    lengths = np.diff(array.offsets.to_numpy())
    if len(lengths) and (lengths != lengths[0]).any():
        raise ValueError(
            f"contains lists of {lengths.min()} to {lengths.max()} values; needed lists of one length: pad them"
        )
    return int(lengths[0]) if len(lengths) else 0


def _axes(kind: pa.FixedShapeTensorType) -> list[int]:
    return list(kind.permutation) if kind.permutation is not None else list(range(len(kind.shape)))


def bytes_of(kind: pa.DataType, values: float) -> float:
    """The bytes of a row in memory; `values` is how many numbers it has, where the type does not say so."""
    shape = item_shape(kind)
    assert shape is not None
    known = [size for size in shape if size is not None]
    return value_bytes(kind) * (prod(known) if len(known) == len(shape) else values)
