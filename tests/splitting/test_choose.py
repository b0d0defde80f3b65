from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CNN, mlp
from raypar.errors import ModelError, SplitError
from raypar.splitting.choose import choose_split
from raypar.splitting.export import described
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from support.models import AsksForLength

CPU = torch.device("cpu")
IMAGES = torch.zeros(16, 1, 28, 28)


def spec(build_model: Callable[[], nn.Module]) -> ModelSpec:
    return ModelSpec(build_model, F.cross_entropy, lambda module: torch.optim.SGD(module.parameters(), lr=0.1))


def measured(*seconds: float) -> Callable[[Split], list[float]]:
    """A measurement that finds these times, one for each unit that it is asked for."""

    def measure(units: Split) -> list[float]:
        assert len(units.names) + 1 == len(seconds)
        return list(seconds)

    return measure


def never(units: Split) -> list[float]:
    raise AssertionError(f"measured {units}, though nobody needs to know")


# ---------------------------------------------------------------- where to split


def test_one_stage_is_not_split_nor_built():
    def build() -> nn.Module:
        raise AssertionError("built")

    assert choose_split(spec(build), (0,), None, IMAGES, never) == Split()


def test_the_users_names_in_the_models_order():
    """Nothing is measured then."""
    split = choose_split(spec(CNN), (0, 1, 0), ["fc2", "conv2"], IMAGES, never)
    assert split == Split(names=("conv2", "fc2"), opened=(), arguments=("images",))


def test_balance_by_measured_time():
    assert choose_split(spec(CNN), (0, 1), None, IMAGES, measured(4, 4, 1, 1)).names == ("conv2",)
    assert choose_split(spec(CNN), (0, 1), None, IMAGES, measured(1, 1, 4, 4)).names == ("fc2",)
    assert choose_split(spec(CNN), (0, 1, 2), None, IMAGES, measured(4, 4, 1, 1)).names == ("conv2", "fc1")
    assert choose_split(spec(CNN), (0, 1, 0), None, IMAGES, measured(1, 4, 4, 1)).names == ("conv2", "fc2")


def test_each_possible_stage_is_measured():
    asked: list[Split] = []

    def measure(units: Split) -> list[float]:
        asked.append(units)
        return [1.0] * 6

    choose_split(spec(mlp), (0, 1), None, IMAGES, measure)
    assert asked == [Split(names=("1", "2", "3", "4", "5"), opened=(), arguments=("input",))]


def test_without_example_parameters_are_counted():
    """Without example_inputs the number of parameters decides, and a warning says what to do."""
    with pytest.warns(UserWarning, match=r"by the number of parameters .*: give parallelize example_inputs to balance"):
        split = choose_split(spec(CNN), (0, 1), None, None, never)
    assert split.names == ("fc1",)  # the linear layers hold 96 % of the parameters


def test_blocks_are_opened_for_enough_modules():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = CNN(), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.features(x))
            return logits

    split = choose_split(spec(Outer), (0, 1, 2), None, IMAGES, measured(1, 1, 1, 1, 2))
    assert split == Split(names=("features.fc1", "head"), opened=("features",), arguments=("x",))


class Backbone(nn.Module):
    def __init__(self, layers: int = 6, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Net(nn.Module):
    """Two modules for two stages, one of which does all the work."""

    def __init__(self, backbone: Callable[[], nn.Module] = Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone(), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


WIDE = torch.zeros(4, 64)


def by_size(units: Split) -> list[float]:
    """Measures a Net: each of the backbone's layers takes a second, the backbone six, the head next to nothing."""
    return [0.01 if name == "head" else 1.0 if units.opened else 6.0 for name in ("first", *units.names)]


def test_a_module_above_a_fair_share_is_opened():
    """A backbone with a head was split between the two: 1,575,936 parameters here, 1,539 there."""
    asked: list[Split] = []

    def measure(units: Split) -> list[float]:
        asked.append(units)
        return by_size(units)

    split = choose_split(spec(Net), (0, 1), None, WIDE, measure)
    assert split == Split(("backbone.layers.3",), ("backbone",), ("x",))
    assert [units.opened for units in asked] == [(), ("backbone",)]
    with pytest.warns(UserWarning, match="by the number of parameters"):
        assert choose_split(spec(Net), (0, 1), None, None, never).names == ("backbone.layers.3",)


def test_a_fair_share_opens_nothing():
    """The modules are measured once."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Backbone(), Backbone()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))  # type: ignore[no-any-return]

    assert choose_split(spec(Pair), (0, 1), None, WIDE, measured(3, 3.2)) == Split(("two",), (), ("x",))


class LooksAtValues(Backbone):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class SharedNormBackbone(Backbone):
    def __init__(self) -> None:
        super().__init__(2)
        self.layers = nn.ModuleList([nn.BatchNorm1d(64), nn.BatchNorm1d(64)])
        self.layers[1].running_mean = self.layers[0].running_mean


class Hooked(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize("backbone", [LooksAtValues, SharedNormBackbone, Hooked])
def test_what_cannot_be_split_inside_stays_whole(
    backbone: Callable[[], nn.Module],
):
    """A warning says that the stages are far from balanced."""

    def measure(units: Split) -> list[float]:
        return [3.0, 3.0, 0.01] if units.opened else [6.0, 0.01]

    with pytest.warns(UserWarning, match=r"far from balanced: one of the 2 .* takes 100% of the time with split="):
        split = choose_split(spec(lambda: Net(backbone)), (0, 1), None, WIDE, measure)
    assert split == Split(("head",), (), ("x",))


def test_what_cannot_be_measured_stays_whole():
    def measure(units: Split) -> list[float]:
        if units.opened:
            raise SplitError("a stage changes 'x' in place")
        return by_size(units)

    with pytest.warns(UserWarning, match="far from balanced"):
        assert choose_split(spec(Net), (0, 1), None, WIDE, measure).names == ("head",)


def test_opening_without_gain_is_dropped():
    """A module stays whole if opening it brings no better balance."""

    def measure(units: Split) -> list[float]:
        return [0.01, 0.01, 6.0, 0.01, 0.01, 0.01, 0.01] if units.opened else [6.0, 0.01]

    with pytest.warns(UserWarning, match="far from balanced"):
        assert choose_split(spec(Net), (0, 1), None, WIDE, measure).opened == ()


def test_stages_on_one_actor_are_balanced():
    """Whatever they cost."""
    assert choose_split(spec(Net), (0, 0), None, WIDE, by_size) == Split(("head",), (), ("x",))


def test_arguments_come_from_example_inputs():
    """The names of the arguments of forward that batches pass."""

    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.a(x)
            return self.b(y if mask is None else y * mask)  # type: ignore[no-any-return]

    example = {"x": torch.zeros(2, 4), "mask": torch.ones(2, 4)}
    assert choose_split(spec(WithMask), (0, 1), ["b"], example, never).arguments == ("x", "mask")
    assert choose_split(spec(WithMask), (0, 1), ["b"], torch.zeros(2, 4), never).arguments == ("x",)
    assert choose_split(spec(WithMask), (0, 1), ["b"], None, never).arguments is None


# ---------------------------------------------------------------- what is refused before weights are allocated


class OnMetaOnly:
    """Builds a model, but only where its weights take no storage."""

    def __init__(self, build_model: Callable[[], nn.Module]) -> None:
        self.build_model = build_model

    def __call__(self) -> nn.Module:
        assert torch.empty(0).device.type == "meta", "weights were allocated"
        return self.build_model()


class Box:
    """No tensor, no number."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class MakesBox(nn.Module):
    def forward(self, x: Tensor) -> Box:
        return Box(x)


class OpensBox(nn.Module):
    def forward(self, box: Box) -> Tensor:
        return box.value


class MakesSparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


def boxed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), MakesBox(), OpensBox(), nn.Linear(4, 2))


def sparse() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), MakesSparse(), nn.Identity())


def norm_called_twice() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, nn.ReLU(), norm)


ROWS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("build", "stages", "split", "example", "message"),
    [
        (boxed, 2, ["2"], ROWS, r"a value of type Box cannot cross a stage border; needed tensors .*: choose `split`"),
        (norm_called_twice, 2, ["1"], ROWS, r"'0.running_mean' is used by stages \[0, 1\]"),
        (CNN, 5, None, IMAGES, r"the plan has 5 stages, but CNN has only 4 modules"),
        (CNN, 2, ["conv3"], IMAGES, r"the model has no module 'conv3'; did you mean 'conv2' or 'conv1'\?"),
        (CNN, 2, ["conv1"], None, r"'conv1' is the first module"),
        (CNN, 3, ["conv2"], None, r"makes 2 stages, but the plan has 3"),
    ],
)
def test_what_cannot_be_split_is_refused_early(
    build: Callable[[], nn.Module], stages: int, split: list[str] | None, example: Any, message: str
):
    """Before any weights are allocated."""
    with pytest.raises(SplitError, match=message):
        choose_split(spec(OnMetaOnly(build)), tuple(range(stages)), split, example, never)


def test_any_value_may_stay_inside_a_stage():
    assert choose_split(spec(OnMetaOnly(boxed)), (0, 1), ["3"], ROWS, never).names == ("3",)


def test_inputs_that_do_not_fit_are_refused_early():
    """Before any weights are allocated."""
    with pytest.raises(ModelError, match=r"the inputs do not fit CNN\.forward.*too many positional arguments"):
        choose_split(spec(OnMetaOnly(CNN)), (0, 1), ["conv2"], (IMAGES, IMAGES), never)


def test_one_process_builds_at_a_time():
    """A model that cannot be built on the meta device is built for real, while no other process here builds one."""

    def build() -> nn.Module:
        model = mlp()
        assert model[1].weight.sum().item() != 7
        lock = Path(tempfile.gettempdir()) / f"raypar-build-{os.getuid()}.lock"
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return model

    assert choose_split(spec(build), (0, 1), ["3"], IMAGES, never).names == ("3",)


def test_borders_of_code_that_looks_at_values():
    """Such code cannot run on the meta device: its borders are checked at the first step."""

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    split = choose_split(
        spec(lambda: nn.Sequential(nn.Linear(4, 4), Looks(), nn.Linear(4, 2))), (0, 1), ["2"], ROWS, never
    )
    assert split.names == ("2",)


# ---------------------------------------------------------------- real measurements


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the stages are far from balanced")
def test_measured_times_separate_the_convolutions():
    """The only test that the times of this machine decide."""
    images = torch.zeros(64, 1, 28, 28)  # as many as make the convolutions far slower than anything else

    def measure(units: Split) -> list[float]:
        return measure_units(spec(CNN), units, images, CPU)

    assert choose_split(spec(CNN), (0, 1), None, images, measure).names == ("conv2",)
    assert "conv2" in choose_split(spec(CNN), (0, 1, 2), None, images, measure).names


# ---------------------------------------------------------------- where torch.fx is not enough


def test_an_example_only_where_export_needs_it():
    """A split carries the shapes of the inputs only if the graph needs torch.export."""
    asked: list[Split] = []

    def measure(units: Split) -> list[float]:
        asked.append(units)
        return by_size(units)

    split = choose_split(spec(lambda: Net(AsksForLength)), (0, 1), None, WIDE, measure)
    assert split == Split(("backbone.b",), ("backbone",), ("x",), described(WIDE))
    assert [units.example for units in asked] == [None, described(WIDE)]


def test_exporting_needs_no_weights():
    """torch.export, too, sees the model on the meta device."""
    assert choose_split(spec(OnMetaOnly(AsksForLength)), (0, 1), ["b"], WIDE, never).example == described(WIDE)
    with pytest.raises(SplitError, match=r"torch\.fx could not trace .*With parallelize\(example_inputs=…\)"):
        choose_split(spec(OnMetaOnly(AsksForLength)), (0, 1), ["b"], None, never)
