from __future__ import annotations

import re
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raypar.checkpoint.weights import check_fits, read_tensors, shapes_of
from raypar.errors import CheckpointError
from raypar.storage import Storage, absolute
from support.saved import write
from support.store import memory_store

STATE = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2), "head.weight": torch.full((1, 2), 3.0)}


def write_weights(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return str(path)


each_kind = pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])


SHAPES = shapes_of(STATE)


@each_kind
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_only_wanted_tensors_are_read(tmp_path: Path, name: str, scheme: str):
    tensors = read_tensors(scheme + write_weights(tmp_path / name, STATE), ["head.weight"], SHAPES)
    assert list(tensors) == ["head.weight"]
    assert tensors["head.weight"].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_safetensors_keep_types_and_shapes(tmp_path: Path, dtype: torch.dtype):
    state = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.tensor(1).to(dtype), "c": torch.zeros(0, 3)}
    tensors = read_tensors(write_weights(tmp_path / "w.safetensors", state), ["c", "b", "a"], shapes_of(state))
    for name, tensor in tensors.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> pafs.FileSystem:
    return memory_store(monkeypatch)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_weights_come_from_a_store_of_objects(
    store: pafs.FileSystem, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    content = Path(write_weights(tmp_path / name, STATE)).read_bytes()
    with store.open_output_stream(f"bucket/{name}") as stream:
        stream.write(content)
    assert read_tensors(f"mem://bucket/{name}", ["fc.bias"], SHAPES)["fc.bias"].tolist() == [0.0, 0.0]
    is_read_whole = f"weights='mem://bucket/{name}' is read whole by each process"
    assert (is_read_whole in caplog.text) == name.endswith(".pt")
    with pytest.raises(CheckpointError, match=r"weights='mem://bucket/other': no such file; needed"):
        read_tensors("mem://bucket/other", [], {})


def test_a_checkpoint_in_a_store_of_objects_gives_weights(store: pafs.FileSystem):
    path = write(Storage.open("bucket/runs", "digits", store), 7)
    assert read_tensors(f"mem://{path}", ["fc.bias"], {"fc.weight": (2, 2), "fc.bias": (2,)})["fc.bias"].sum() == 0


def test_a_uri_stays_whole_in_the_error():
    """It was once taken for a local path: no such file as /home/me/s3:/bucket/w.safetensors."""
    for uri in ("s3://bucket/w.safetensors?endpoint_override=127.0.0.1:1&scheme=what", "what://w.safetensors"):
        with pytest.raises(CheckpointError, match=rf"weights='{re.escape(uri)}' cannot be reached: "):
            read_tensors(absolute(uri), [], {})


@each_kind
def test_other_names_are_listed(tmp_path: Path, name: str):
    extra = {f"old.{index}": torch.zeros(1) for index in range(12)}
    path = write_weights(tmp_path / name, {"fc.weight": STATE["fc.weight"], **extra})
    with pytest.raises(CheckpointError, match=r"2 missing \(fc\.bias, head\.weight\) and 12 extra \(old\.") as caught:
        read_tensors(path, ["fc.weight"], SHAPES)
    assert str(caught.value).count("old.") == 10, "the first ten are enough"


@each_kind
def test_other_shapes_are_listed(tmp_path: Path, name: str):
    """Of all tensors, not only of those that this process holds: each process gives the same error."""
    path = write_weights(tmp_path / name, STATE)
    with pytest.raises(CheckpointError, match=r"1 tensors of another shape than the model: fc\.bias \(2,\) for \(3,\)"):
        read_tensors(path, ["fc.weight"], {**SHAPES, "fc.bias": (3,)})


def test_check_fits_says_only_what_differs():
    for shapes, said in (({"c": ()}, "1 missing (a) and 1 extra (c)"), ({"a": (), "c": ()}, "1 extra (c)")):
        with pytest.raises(CheckpointError) as caught:
            check_fits("the file", shapes, {"a": ()}, advice="; do that")
        assert str(caught.value) == f"the file does not fit the model: {said}; do that"


def test_the_last_name_of_a_tied_weight_counts():
    same = {"a": ["a", "b"], "b": ["a", "b"]}
    assert check_fits("", {"a": (1,)}, {"a": (1,), "b": (1,)}, same=same) == {"a": "a", "b": "a"}
    assert check_fits("", {"a": (1,), "b": (1,)}, {"a": (1,), "b": (1,)}, same=same) == {"a": "b", "b": "b"}


def test_a_checkpoint_gives_weights(tmp_path: Path):
    path = write(Storage.open(tmp_path, "digits"), 7)
    model = {"fc.weight": (2, 2), "fc.bias": (2,)}
    tensors = read_tensors(path, ["fc.weight"], model)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"fc.weight": [[7.0, 7.0], [7.0, 7.0]]}
    with pytest.raises(CheckpointError, match=r"checkpoint_00000007' does not fit the model: 1 missing \(head\)"):
        read_tensors(path, ["fc.weight"], {**model, "head": (1,)})


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_gives_no_weights(tmp_path: Path, name: str):
    """Only a run that resumes looked at the checksums: given as weights, a damaged checkpoint was read as it was."""
    path = write(Storage.open(tmp_path, "digits"), 7)
    content = Path(path, name).read_bytes()
    Path(path, name).write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read_tensors(path, ["fc.weight"], {"fc.weight": (2, 2), "fc.bias": (2,)})


def test_missing_weights_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"weights='.*nowhere\.pt': no such file on this machine"):
        read_tensors(str(tmp_path / "nowhere.pt"), [], {})


@each_kind
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"no weights at all, but long enough to be read as a header")
    with pytest.raises(CheckpointError, match=r"weights='.*' cannot be read as a \.safetensors"):
        read_tensors(str(tmp_path / name), [], {})


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, needed a state dict"):
        read_tensors(str(tmp_path / "list.pt"), [], {})


def test_a_file_that_would_run_code_is_refused(tmp_path: Path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(str(tmp_path / "module.pt"), [], {})
