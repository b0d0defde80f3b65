from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models import CNN, mlp
from raypar.engine.build import build_part
from raypar.errors import CheckpointError, ModelError
from raypar.planning.plan import Plan
from raypar.splitting.model import ModelSpec, Split, build_whole
from raypar.splitting.split import split_model
from raypar.stages.model_part import ModelPart
from support.cases import plain_sgd

CPU = torch.device("cpu")


def spec(build_model: Callable[[], nn.Module], split: tuple[str, ...] = (), weights: Path | None = None) -> ModelSpec:
    where = Split(split, opened=tuple({name.rpartition(".")[0] for name in split if "." in name}))
    return ModelSpec(build_model, F.cross_entropy, plain_sgd, weights=str(weights) if weights else None, split=where)


def build_parts(made: ModelSpec, plan: Plan) -> list[ModelPart]:
    return [build_part(made, plan, actor, CPU) for actor in range(plan.pipeline)]


def batch_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), nn.Dropout(0.5), nn.Flatten(), nn.Linear(1352, 10)
    )


# ---------------------------------------------------------------- the whole model


class Counting(nn.Linear):
    """Keeps something in its state dict that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize("plan", [Plan(), Plan(pipeline=2)])
def test_extra_state_is_refused(plan: Plan):
    """No checkpoint would restore it; the error names it.

    History: an AttributeError, 'dict' object has no attribute 'shape'.
    """
    split = ("1",) if plan.pipeline > 1 else ()
    made = spec(lambda: nn.Sequential(nn.Linear(2, 2), Counting(2, 2)), split)
    with pytest.raises(ModelError, match=r"holds '1\._extra_state', a dict that is neither a parameter nor a buffer"):
        build_part(made, plan, 0, CPU)


# ---------------------------------------------------------------- the part of an actor


@pytest.mark.parametrize(
    ("build", "split", "plan"),
    [
        (CNN, ("conv2",), Plan(pipeline=2)),
        (CNN, ("conv2", "fc2"), Plan(pipeline=2, placement=[0, 1, 0])),
        (mlp, ("3", "5"), Plan(pipeline=3)),
        (batch_norm_net, ("0.1", "3"), Plan(pipeline=2, placement=[0, 1, 1])),
        (CNN, (), Plan()),
    ],
)
def test_all_parts_together_are_the_model(build: Callable[[], nn.Module], split: tuple[str, ...], plan: Plan):
    whole = build_whole(spec(build, split))
    parts = build_parts(spec(build, split), plan)
    names = [name for part in parts for name in part.module.state_dict()]
    assert sorted(names) == sorted(whole.state_dict())
    for part in parts:
        assert part.names == {name: value.shape for name, value in whole.state_dict().items()}
        assert list(part.names) == list(whole.state_dict())
        for name, value in part.module.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name])
            assert plan.actor_of_stage[part.owner[name]] == parts.index(part)


def test_a_part_keeps_names_and_types():
    first, second = build_parts(spec(batch_norm_net, ("3",)), Plan(pipeline=2))
    assert list(dict(first.module.named_parameters())) == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"]
    assert list(dict(second.module.named_parameters())) == ["3.weight", "3.bias"]
    types = {name: type(module) for name, module in batch_norm_net().named_modules()}
    for part in (first, second):
        assert type(part.module) is nn.Sequential
        assert all(types[name] is type(module) for name, module in part.module.named_modules())


def test_a_part_lacks_other_actors_modules():
    """It is of the user's own class."""
    first, second = build_parts(spec(CNN, ("fc1",)), Plan(pipeline=2))
    assert [type(part.module) for part in (first, second)] == [CNN, CNN]
    assert [name for name, _ in first.module.named_children()] == ["conv1", "conv2"]
    assert [name for name, _ in second.module.named_children()] == ["fc1", "fc2"]


def test_stages_train_their_own_parameters():
    (part,) = build_parts(spec(CNN, ("conv2", "fc2")), Plan(placement=[0, 0, 0]))
    model = part.module
    assert isinstance(model, CNN)
    assert list(part.stages) == [0, 1, 2]
    assert [list(map(id, part.trainable(stage))) for stage in part.stages] == [
        [id(model.conv1.weight), id(model.conv1.bias)],
        [id(model.conv2.weight), id(model.conv2.bias), id(model.fc1.weight), id(model.fc1.bias)],
        [id(model.fc2.weight), id(model.fc2.bias)],
    ]


def test_frozen_parameters_are_not_trained():
    def build() -> nn.Module:
        model = CNN()
        model.conv1.requires_grad_(False)
        model.fc2.bias.requires_grad_(False)
        return model

    first, second = build_parts(spec(build, ("conv2",)), Plan(pipeline=2))
    assert first.trainable(0) == []
    assert len(second.trainable(1)) == 5


def test_only_the_last_stage_has_the_loss():
    parts = build_parts(spec(CNN, ("conv2", "fc2")), Plan(pipeline=2, placement=[0, 1, 0]))
    assert {index: stage.is_last for part in parts for index, stage in part.stages.items()} == {
        0: False, 1: False, 2: True,
    }  # fmt: skip


def test_tied_parameters_stay_tied_in_their_part():
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        model[2].weight = model[0].weight
        return model

    first, second = build_parts(spec(build, ("3",)), Plan(pipeline=2))
    assert first.module.get_parameter("0.weight") is first.module.get_parameter("2.weight")
    assert sorted(first.module.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert sorted(second.module.state_dict()) == ["3.bias", "3.weight"]


def test_a_whole_model_is_not_traced():
    """In a single actor any forward will do."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y if y.sum() > 0 else -y

    (part,) = build_parts(spec(Looks), Plan())
    x = torch.rand(3, 2)
    (output,) = part.stages[0].codes["train"].run(x, {})
    assert torch.equal(output, part.module(x))
    assert part.edges == {"train": set(), "eval": set()}


def test_eval_mode_may_have_other_edges():
    class Differs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            last: Tensor = self.c(self.b(first))
            return last + first if self.training else last

    model = Differs()
    model.b.eval()
    cuts = split_model(model, Split(("b", "c")), 3)
    assert sorted(cuts["train"][0].sends) == [1, 2]
    assert sorted(cuts["eval"][0].sends) == [1]
    assert [model.training, model.a.training, model.b.training] == [True, True, False]
    part = build_part(spec(Differs, ("b", "c")), Plan(pipeline=3), 0, CPU)
    assert part.edges == {"train": {(0, 1), (0, 2), (1, 2)}, "eval": {(0, 1), (1, 2)}}


# ---------------------------------------------------------------- weights from a file


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["cnn.safetensors", "cnn.pt"])
def test_each_actor_reads_its_own_weights(tmp_path: Path, name: str):
    state = {key: torch.full_like(value, index) for index, (key, value) in enumerate(CNN().state_dict().items())}
    path = write(tmp_path / name, state)
    for part in build_parts(spec(CNN, ("conv2", "fc2"), path), Plan(pipeline=2, placement=[0, 1, 0])):
        for key, value in part.module.state_dict().items():
            assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", ["cnn.safetensors", "cnn.pt"])
def test_weights_of_another_model_are_refused(tmp_path: Path, name: str):
    """Every actor refuses them, with the names that do not fit."""
    state = CNN().state_dict()
    state["head.weight"] = state.pop("fc2.weight")
    made = spec(CNN, ("conv2",), write(tmp_path / name, state))
    for actor in (0, 1):
        with pytest.raises(CheckpointError, match=r"1 missing \(fc2\.weight\) and 1 extra \(head\.weight\)"):
            build_part(made, Plan(pipeline=2), actor, CPU)


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    state = CNN().state_dict() | {"fc2.weight": torch.zeros(3, 128)}
    path = write(tmp_path / "cnn.pt", state)
    with pytest.raises(CheckpointError, match=r"fc2\.weight \(3, 128\) for \(10, 128\)"):
        build_part(spec(CNN, (), path), Plan(), 0, CPU)
