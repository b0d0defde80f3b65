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


# ---------------------------------------------------------------- where to cut


def test_one_stage_is_not_cut_and_not_even_built():
    def build() -> nn.Module:
        raise AssertionError("built")

    assert choose_split(spec(build), (0,), None, IMAGES, never) == Split()


def test_the_users_names_are_taken_in_the_order_of_the_model_without_measuring():
    split = choose_split(spec(CNN), (0, 1, 0), ["fc2", "conv2"], IMAGES, never)
    assert split == Split(names=("conv2", "fc2"), opened=(), arguments=("images",))


def test_with_example_inputs_a_model_is_cut_in_balance_by_measured_time():
    assert choose_split(spec(CNN), (0, 1), None, IMAGES, measured(4, 4, 1, 1)).names == ("conv2",)
    assert choose_split(spec(CNN), (0, 1), None, IMAGES, measured(1, 1, 4, 4)).names == ("fc2",)
    assert choose_split(spec(CNN), (0, 1, 2), None, IMAGES, measured(4, 4, 1, 1)).names == ("conv2", "fc1")
    assert choose_split(spec(CNN), (0, 1, 0), None, IMAGES, measured(1, 4, 4, 1)).names == ("conv2", "fc2")


def test_each_module_that_could_begin_a_stage_is_measured():
    asked: list[Split] = []

    def measure(units: Split) -> list[float]:
        asked.append(units)
        return [1.0] * 6

    choose_split(spec(mlp), (0, 1), None, IMAGES, measure)
    assert asked == [Split(names=("1", "2", "3", "4", "5"), opened=(), arguments=("input",))]


def test_without_example_inputs_the_number_of_parameters_decides_and_a_warning_says_what_to_do():
    with pytest.warns(UserWarning, match=r"by the number of parameters .*: give parallelize example_inputs to balance"):
        split = choose_split(spec(CNN), (0, 1), None, None, never)
    assert split.names == ("fc1",)  # the linear layers hold 96 % of the parameters


def test_blocks_are_opened_where_there_are_too_few_modules():
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


def test_a_module_that_is_larger_than_a_fair_share_is_opened_though_there_are_enough_modules():
    """A backbone with a head was cut between the two: 1,575,936 parameters here, 1,539 there."""
    asked: list[Split] = []

    def measure(units: Split) -> list[float]:
        asked.append(units)
        return by_size(units)

    split = choose_split(spec(Net), (0, 1), None, WIDE, measure)
    assert split == Split(("backbone.layers.3",), ("backbone",), ("x",))
    assert [units.opened for units in asked] == [(), ("backbone",)]
    with pytest.warns(UserWarning, match="by the number of parameters"):
        assert choose_split(spec(Net), (0, 1), None, None, never).names == ("backbone.layers.3",)


def test_modules_that_share_fairly_stay_closed_and_are_measured_once():
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
def test_a_module_that_cannot_be_cut_inside_stays_whole_and_a_warning_says_that_the_stages_are_lopsided(
    backbone: Callable[[], nn.Module],
):
    def measure(units: Split) -> list[float]:
        return [3.0, 3.0, 0.01] if units.opened else [6.0, 0.01]

    with pytest.warns(UserWarning, match=r"far from balanced: one of the 2 .* takes 100% of the time with split="):
        split = choose_split(spec(lambda: Net(backbone)), (0, 1), None, WIDE, measure)
    assert split == Split(("head",), (), ("x",))


def test_a_module_whose_inside_cannot_be_measured_stays_whole():
    def measure(units: Split) -> list[float]:
        if units.opened:
            raise SplitError("a stage changes 'x' in place")
        return by_size(units)

    with pytest.warns(UserWarning, match="far from balanced"):
        assert choose_split(spec(Net), (0, 1), None, WIDE, measure).names == ("head",)


def test_opening_a_module_that_brings_no_better_balance_is_not_kept():
    def measure(units: Split) -> list[float]:
        return [0.01, 0.01, 6.0, 0.01, 0.01, 0.01, 0.01] if units.opened else [6.0, 0.01]

    with pytest.warns(UserWarning, match="far from balanced"):
        assert choose_split(spec(Net), (0, 1), None, WIDE, measure).opened == ()


def test_stages_on_one_actor_are_in_balance_whatever_they_cost():
    assert choose_split(spec(Net), (0, 0), None, WIDE, by_size) == Split(("head",), (), ("x",))


def test_the_names_of_the_arguments_that_batches_pass_come_from_example_inputs():
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
def test_a_model_that_cannot_be_cut_is_refused_before_its_weights_are_allocated(
    build: Callable[[], nn.Module], stages: int, split: list[str] | None, example: Any, message: str
):
    with pytest.raises(SplitError, match=message):
        choose_split(spec(OnMetaOnly(build)), tuple(range(stages)), split, example, never)


def test_the_same_value_may_stay_inside_a_stage():
    assert choose_split(spec(OnMetaOnly(boxed)), (0, 1), ["3"], ROWS, never).names == ("3",)


def test_inputs_that_do_not_fit_forward_are_refused_before_weights_are_allocated():
    with pytest.raises(ModelError, match=r"the inputs do not fit CNN\.forward.*too many positional arguments"):
        choose_split(spec(OnMetaOnly(CNN)), (0, 1), ["conv2"], (IMAGES, IMAGES), never)


def test_a_model_that_cannot_be_built_without_storage_is_built_for_real_while_no_other_process_of_the_machine_builds():
    def build() -> nn.Module:
        model = mlp()
        assert model[1].weight.sum().item() != 7
        lock = Path(tempfile.gettempdir()) / f"raypar-build-{os.getuid()}.lock"
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return model

    assert choose_split(spec(build), (0, 1), ["3"], IMAGES, never).names == ("3",)


def test_code_that_looks_at_values_has_its_borders_checked_at_the_first_step_instead():
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


def test_every_unit_takes_time():
    times = measure_units(spec(CNN), Split(("conv2", "fc1", "fc2")), IMAGES, CPU)
    assert len(times) == 4
    assert all(seconds > 0 for seconds in times)


def test_units_with_skips_dictionaries_and_outputs_without_a_gradient_can_be_measured():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
            first = self.embed(tokens)
            second = self.a(first * mask)
            return {"logits": self.b(second) + first, "best": second.argmax(-1)}

    inputs = {"tokens": torch.ones(3, 2, dtype=torch.int64), "mask": torch.ones(3, 2, 1)}
    times = measure_units(spec(Skips), Split(("a", "b"), (), ("tokens", "mask")), inputs, CPU)
    assert all(seconds > 0 for seconds in times)


# ---------------------------------------------------------------- where torch.fx is not enough


class AsksForLength(nn.Module):
    """A branch on a size, which torch.fx cannot trace and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) if x.shape[1] > 3 else x)  # type: ignore[no-any-return]


def test_a_cut_carries_the_form_of_the_inputs_only_where_the_graph_needs_torch_export():
    asked: list[Split] = []

    def measure(units: Split) -> list[float]:
        asked.append(units)
        return by_size(units)

    split = choose_split(spec(lambda: Net(AsksForLength)), (0, 1), None, WIDE, measure)
    assert split == Split(("backbone.b",), ("backbone",), ("x",), described(WIDE))
    assert [units.example for units in asked] == [None, described(WIDE)]


def test_torch_export_too_sees_a_model_before_its_weights_are_allocated():
    assert choose_split(spec(OnMetaOnly(AsksForLength)), (0, 1), ["b"], WIDE, never).example == described(WIDE)
    with pytest.raises(SplitError, match=r"torch\.fx could not trace .*With parallelize\(example_inputs=…\)"):
        choose_split(spec(OnMetaOnly(AsksForLength)), (0, 1), ["b"], None, never)


def test_the_units_of_an_exported_graph_can_be_measured():
    units = Split(("b",), (), ("x",), described(WIDE))
    assert all(seconds > 0 for seconds in measure_units(spec(AsksForLength), units, WIDE, CPU))
