from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raypar.checkpoint.weights import name_lists, read_tensors
from raypar.errors import CheckpointError
from raypar.storage import Storage
from support.saved import write

STATE = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2), "head.weight": torch.full((1, 2), 3.0)}


def write_weights(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return str(path)


each_kind = pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])


@each_kind
def test_only_the_tensors_that_are_wanted_are_read(tmp_path: Path, name: str):
    found = read_tensors(write_weights(tmp_path / name, STATE), ["head.weight"], known=list(STATE))
    assert list(found) == ["head.weight"]
    assert found["head.weight"].tolist() == [[3.0, 3.0]]


@each_kind
def test_names_that_do_not_fit_the_model_are_listed_the_first_ten_of_each(tmp_path: Path, name: str):
    extra = {f"old.{index}": torch.zeros(1) for index in range(12)}
    path = write_weights(tmp_path / name, {"fc.weight": STATE["fc.weight"], **extra})
    with pytest.raises(CheckpointError, match=r"2 missing \(fc\.bias, head\.weight\) and 12 extra \(old\.") as caught:
        read_tensors(path, ["fc.weight"], known=list(STATE))
    assert str(caught.value).count("old.") == 10


def test_only_what_there_is_to_say_about_names_is_said():
    assert name_lists(["a", "b"], []) == "2 missing (a, b)"
    assert name_lists([], ["c"]) == "1 extra (c)"


def test_a_checkpoint_of_another_run_can_be_given_for_its_weights(tmp_path: Path):
    path = write(Storage.open(tmp_path, "digits"), 7)
    found = read_tensors(path, ["fc.weight"], known=["fc.weight", "fc.bias"])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"fc.weight": [[7.0, 7.0], [7.0, 7.0]]}
    with pytest.raises(CheckpointError, match=r"checkpoint_00000007 does not fit the model: 1 missing \(head\)"):
        read_tensors(path, ["fc.weight"], known=["fc.weight", "fc.bias", "head"])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_checkpoint_with_a_wrong_byte_is_refused_before_any_of_it_is_used(tmp_path: Path, name: str):
    """Only a run that resumes looked at the checksums: given as weights, a damaged checkpoint was read as it was."""
    path = write(Storage.open(tmp_path, "digits"), 7)
    content = Path(path, name).read_bytes()
    Path(path, name).write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read_tensors(path, ["fc.weight"], known=["fc.weight", "fc.bias"])


def test_weights_that_are_not_there_are_told_with_the_setting(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"weights='.*nowhere\.pt': no such file on this machine"):
        read_tensors(str(tmp_path / "nowhere.pt"), [], known=[])


@each_kind
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"no weights at all, but long enough to be read as a header")
    with pytest.raises(CheckpointError, match=r"weights='.*' cannot be read as a \.safetensors"):
        read_tensors(str(tmp_path / name), [], known=[])


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, needed a state dict"):
        read_tensors(str(tmp_path / "list.pt"), [], known=[])


def test_a_file_that_would_run_code_is_refused(tmp_path: Path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(str(tmp_path / "module.pt"), [], known=[])
