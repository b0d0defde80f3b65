"""One process that owns several devices: torch.nn.DataParallel around the whole model.

    rows of a micro-batch ─ scatter ─▶ devices 0, 1, …, each with a copy of the model ─ gather ─▶ device 0: the loss

The loss sees all rows at once, so shares of unequal size need no weights; gradients arrive at the one model, on the
first device. Its buffers are those that the first device's rows have left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from raypar.randomness import mixed_seed
from raypar.splitting.model import call
from raypar.splitting.stage_code import StageCode
from raypar.stages.model_part import ModelPart
from raypar.tree import Tree

logger = logging.getLogger("raypar")


def scatter_over(part: ModelPart, devices: Sequence[torch.device]) -> None:
    """Let the one stage of a part run on several CUDA devices, the first of which holds it; with fewer than two it
    stays the plain module, and a warning says so."""
    if len(devices) < 2 or devices[0].type != "cuda":
        logger.warning(
            "Plan(data_strategy='scatter') runs as the plain module: found %s; needed several GPUs in one worker, "
            "Trainer(scaling_config=ScalingConfig(use_gpu=True, resources_per_worker={'GPU': 2})) say",
            ", ".join(map(str, devices)),
        )
        return
    spread = nn.DataParallel(part.module, device_ids=list(devices))

    def forward(inputs: Tree) -> Any:
        _seed_others(devices)
        return call(spread, inputs)

    (stage,) = part.stages.values()
    stage.codes = dict.fromkeys(stage.codes, StageCode.of_forward(forward))


def _seed_others(devices: Sequence[torch.device]) -> None:
    """The engine seeds the first device for each pass; the others draw from seeds of their own that follow from it."""
    generators = torch.cuda.default_generators
    first = generators[devices[0].index or 0].initial_seed()
    for number, device in enumerate(devices[1:], start=1):
        generators[device.index or 0].manual_seed(mixed_seed(first, number))
