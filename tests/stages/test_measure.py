"""Measuring the units of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CNN
from raypar.splitting.export import described
from raypar.splitting.model import ModelSpec, Split
from raypar.stages.measure import measure_units
from support.models import AsksForLength

CPU = torch.device("cpu")
IMAGES = torch.zeros(16, 1, 28, 28)
WIDE = torch.zeros(4, 64)


def spec(build_model: Callable[[], nn.Module]) -> ModelSpec:
    return ModelSpec(build_model, F.cross_entropy, lambda module: torch.optim.SGD(module.parameters(), lr=0.1))


def test_every_unit_takes_time():
    times = measure_units(spec(CNN), Split(("conv2", "fc1", "fc2")), IMAGES, CPU)
    assert len(times) == 4
    assert all(seconds > 0 for seconds in times)


def test_units_of_any_form_are_measured():
    """Skip connections, dicts, and outputs without a gradient."""

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


def test_units_of_an_exported_graph_are_measured():
    units = Split(("b",), (), ("x",), described(WIDE))
    assert all(seconds > 0 for seconds in measure_units(spec(AsksForLength), units, WIDE, CPU))
