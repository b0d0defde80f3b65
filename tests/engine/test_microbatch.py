from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar import tree
from raypar.engine import microbatch
from raypar.engine.microbatch import ReplicaBatch, Shared, shared
from raypar.errors import DataError

CPU = torch.device("cpu")


def rows(count: int, width: int = 2) -> torch.Tensor:
    return torch.arange(count * width, dtype=torch.float32).reshape(count, width)


def cut(batch: Any, sizes: list[int]) -> list[Any]:
    return ReplicaBatch.of(batch).cut(sizes, CPU)[0]


def rows_of(batch: Any) -> int:
    return ReplicaBatch.of(batch).rows


def form_of(batch: Any) -> Hashable:
    return ReplicaBatch.of(batch).form


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("count", "microbatches", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (2, 4, [1, 1]), (1, 4, [1]), (0, 4, []), (5, 1, [5])],
)
def test_rows_are_shared_equally(count: int, microbatches: int, sizes: list[int]):
    """As equally as can be; a short batch uses fewer micro-batches."""
    assert microbatch.sizes(count, microbatches) == sizes


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 20))
def test_micro_batches_are_not_empty_and_shrink(count: int, microbatches: int):
    sizes = microbatch.sizes(count, microbatches)
    assert sum(sizes) == count
    assert len(sizes) == min(count, microbatches)
    assert sizes == sorted(sizes, reverse=True)
    assert all(size >= 1 for size in sizes)
    assert not sizes or sizes[0] - sizes[-1] <= 1


# ---------------------------------------------------------------- cut and join


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6))
def test_cut_and_joined_is_the_batch(count: int, microbatches: int):
    batch = {"x": rows(count), "deep": (rows(count, 3), [rows(count, 1)])}
    parts = cut(batch, microbatch.sizes(count, microbatches))
    again = microbatch.join(parts)
    assert tree.flatten(again)[1] == tree.flatten(batch)[1]
    assert all(map(torch.equal, tree.leaves(again), tree.leaves(batch)))


def test_a_cut_is_a_view_not_a_copy():
    batch = rows(4)
    parts = cut(batch, [2, 2])
    assert parts[1].data_ptr() == batch[2:].data_ptr()


def test_shared_tensors_go_to_each_micro_batch():
    mask = torch.ones(7, 7)
    parts = cut({"x": rows(3), "mask": shared(mask)}, [2, 1])
    assert [part["mask"] is mask for part in parts] == [True, True]
    assert [len(part["x"]) for part in parts] == [2, 1]


def test_plain_values_go_to_each_micro_batch():
    parts = cut((rows(2), 0.5, None, "text"), [1, 1])
    assert [part[1:] for part in parts] == [(0.5, None, "text")] * 2


def test_no_row_makes_no_micro_batch():
    assert cut(rows(0), microbatch.sizes(0, 4)) == []


def test_joined_outputs_keep_their_form():
    outputs = [{"logits": rows(2), "hidden": (rows(2, 1), None)}, {"logits": rows(1), "hidden": (rows(1, 1), None)}]
    joined = microbatch.join(outputs)
    assert torch.equal(joined["logits"], torch.cat([rows(2), rows(1)]))
    assert torch.equal(joined["hidden"][0], torch.cat([rows(2, 1), rows(1, 1)]))
    assert joined["hidden"][1] is None


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "batch",
    [rows(3), np.zeros((3, 2)), (rows(3), rows(3, 5)), {"x": rows(3), "mask": shared(torch.ones(9)), "scale": 0.5}],
)
def test_dimension_zero_counts_the_rows(batch: Any):
    assert rows_of(batch) == 3


def test_tensors_with_different_numbers_of_rows_are_refused():
    with pytest.raises(DataError, match=r"different numbers of rows, found shapes \[\(2, 2\), \(3, 2\)\], needed"):
        rows_of((rows(3), rows(2)))


def test_scalars_must_be_shared():
    with pytest.raises(DataError, match=r"a tensor without dimensions, needed batch first.*raypar\.shared"):
        rows_of((rows(3), torch.tensor(1.0)))
    assert rows_of((rows(3), shared(torch.tensor(1.0)))) == 3


@pytest.mark.parametrize("batch", [(), {"scale": 1.0}, shared(rows(3)), None])
def test_a_batch_without_a_row_tensor_is_refused(batch: Any):
    with pytest.raises(DataError, match="holds no tensor with rows, needed at least one"):
        rows_of(batch)


# ---------------------------------------------------------------- what fixes the shapes inside the model


def test_a_form_leaves_out_only_the_rows():
    described = form_of({"x": rows(3), "mask": shared(torch.ones(2))})
    assert described == form_of({"x": rows(8), "mask": shared(torch.ones(2))})
    assert hash(described) == hash(form_of({"x": rows(0), "mask": shared(torch.ones(2))}))
    others: list[Any] = [
        {"x": rows(3, 3), "mask": shared(torch.ones(2))},
        {"x": rows(3).double(), "mask": shared(torch.ones(2))},
        {"x": rows(3), "mask": shared(torch.ones(5))},
        {"x": rows(3), "mask": torch.ones(3)},
        {"y": rows(3), "mask": shared(torch.ones(2))},
        (rows(3), shared(torch.ones(2))),
    ]
    assert all(form_of(other) != described for other in others)


def test_plain_values_are_part_of_a_form():
    assert form_of((rows(1), 2)) != form_of((rows(1), 3))


def test_a_numpy_batch_has_one_form():
    assert form_of(np.zeros((2, 3))) == form_of(np.ones((5, 3)))


# ---------------------------------------------------------------- arrays and tensors


def test_writable_arrays_are_not_copied():
    array = torch.zeros(2, 3).numpy()
    tensor = microbatch.to_tensors({"x": array}, CPU)["x"]
    array[0, 0] = 5
    assert tensor[0, 0] == 5


def test_read_only_arrays_are_copied():
    """Ray shares them between processes."""
    array = np.arange(3)
    array.flags.writeable = False
    tensor = microbatch.to_tensors((array, shared(array)), CPU)
    tensor[0][0] = 7
    assert (tensor[0].tolist(), tensor[1].value.tolist(), array.tolist()) == ([7, 1, 2], [0, 1, 2], [0, 1, 2])


def test_tensors_travel_as_arrays():
    batch = {"x": rows(3), "mask": shared(torch.ones(2, dtype=torch.bool)), "n": 4}
    arrays = microbatch.to_arrays(batch)
    assert isinstance(arrays["x"], np.ndarray)
    assert isinstance(arrays["mask"], Shared)
    assert np.shares_memory(arrays["x"], batch["x"].numpy())
    again = microbatch.to_tensors(arrays, CPU)
    assert torch.equal(again["x"], batch["x"])
    assert torch.equal(again["mask"].value, torch.ones(2, dtype=torch.bool))
    assert again["n"] == 4


@pytest.mark.parametrize("writeable", [True, False])
def test_tensors_are_aligned_as_torch_aligns(writeable: bool):
    """Small batches come out of Ray's messages, and read-only ones were copied by NumPy, at any address. The product
    with a weight then rounded otherwise from run to run, and a resumed run did not end with the same bits."""
    for offset in range(0, 64, 4):
        memory = np.zeros(256, dtype=np.uint8)
        begin = -memory.ctypes.data % 64 + offset
        array = memory[begin : begin + 96].view(np.float32).reshape(6, 4)
        array[:] = np.arange(24).reshape(6, 4)
        array.flags.writeable = writeable
        tensor = microbatch.to_tensors((array, torch.from_numpy(array.copy())[1:]), CPU)
        assert [row.data_ptr() % 64 for row in tensor] == [0, 0]
        assert tensor[0].tolist() == array.tolist()
        assert tensor[1].tolist() == array[1:].tolist()


def test_bfloat16_travels_as_a_tensor():
    tensor = torch.ones(2, dtype=torch.bfloat16)
    assert microbatch.to_arrays(tensor) is tensor


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        (torch.ones(2), True),
        ((torch.ones(2), [torch.tensor([1.0, float("inf")])]), False),
        ({"x": torch.tensor(float("nan"))}, False),
        (torch.tensor([1, 2]), True),
        ((None, 3, "x"), True),
        (torch.zeros(0), True),
    ],
)
def test_when_values_are_finite(values: Any, finite: bool):
    """If no floating-point tensor holds NaN or infinity."""
    assert microbatch.is_finite(values) is finite
