"""One process with several GPUs: torch.nn.DataParallel around the whole model.

    rows of a micro-batch ─ scatter ─▶ devices 0, 1, …, each with a copy of the model ─ gather ─▶ device 0: the loss

The loss sees all rows at once, so unequal shares need no weights. Gradients arrive at the model itself, on the first
device; its buffers are changed by the first device's rows only.
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
    """Make a part's only stage run on several CUDA devices, the first of which holds it. With fewer than two it stays
    the plain module, and a warning says so."""
    if len(devices) < 2 or devices[0].type != "cuda":
        logger.warning(
            "Plan(data_strategy='scatter') runs as the plain module: found %s; needed several GPUs in one worker, "
            "for example Trainer(scaling_config=ScalingConfig(use_gpu=True, resources_per_worker={'GPU': 2}))",
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
    """Seed the other devices, each differently, from the seed that the engine gives the first one for each pass."""
    generators = torch.cuda.default_generators
    first = generators[devices[0].index or 0].initial_seed()
    for number, device in enumerate(devices[1:], start=1):
        generators[device.index or 0].manual_seed(mixed_seed(first, number))
