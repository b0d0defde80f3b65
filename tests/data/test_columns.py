from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raypar.data.columns import bytes_of, item_shape, to_array


def tensors(values: np.ndarray, permutation: list[int] | None = None) -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:], permutation=permutation)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values[0].size)
    return pa.ExtensionArray.from_storage(kind, flat)


NUMBERS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1, 2, 3]), np.array([1, 2, 3])),
        (pa.array([True, False, True]), np.array([True, False, True])),
        (pa.array(np.float16([1.5, 2])), np.array([1.5, 2], np.float16)),
        (pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS), 4), NUMBERS.reshape(6, 4)),
        (
            pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS), 4), 3),
            NUMBERS.reshape(2, 3, 4),
        ),
        (tensors(NUMBERS.reshape(2, 3, 4)), NUMBERS.reshape(2, 3, 4)),
        (tensors(NUMBERS.reshape(2, 3, 4), [1, 0]), NUMBERS.reshape(2, 3, 4).transpose(0, 2, 1)),
        (
            pa.FixedSizeListArray.from_arrays(tensors(NUMBERS.reshape(4, 2, 3), [1, 0]), 2),
            NUMBERS.reshape(2, 2, 2, 3).transpose(0, 1, 3, 2),
        ),
        (pa.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])),
        (pa.array([[[1], [2]], [[3], [4]]]), np.array([[[1], [2]], [[3], [4]]])),
        (pa.array([[1, 2], [3, 4]], pa.large_list(pa.int8())), np.array([[1, 2], [3, 4]], np.int8)),
    ],
)
def test_a_column_becomes_an_array(array: pa.Array, expected: np.ndarray):
    found = to_array(array)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert np.array_equal(to_array(array.slice(1)), expected[1:])
    known = item_shape(array.type)
    assert known is not None
    assert [size for size in known if size is not None] == [
        size for size, told in zip(expected.shape[1:], known, strict=True) if told is not None
    ]
    assert bytes_of(array.type, expected[0].size) == expected[0].nbytes


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([1, None]), "has 1 nulls"),
        (pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), "has 1 nulls"),
        (pa.array([[1, None], [3, 4]], pa.list_(pa.int64(), 2)), "has 1 nulls"),
        (pa.array([[1], None]), "has 1 nulls"),
        (pa.array([[1], [2, 3], []]), "contains lists of 0 to 2 values; needed lists of one length"),
        (pa.array([[[1], [2, 3]], [[4], [5]]]), "contains lists of 1 to 2 values"),
    ],
)
def test_what_is_no_tensor_is_told(array: pa.Array, message: str):
    with pytest.raises(ValueError, match=message):
        to_array(array)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.timestamp("s"), pa.list_(pa.string()), pa.struct([("a", pa.int8())]), pa.null(), pa.decimal128(5)],
)
def test_types_that_are_no_numbers_have_no_shape(kind: Any):
    assert item_shape(kind) is None
