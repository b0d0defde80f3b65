"""torch.nn.DataParallel in one worker that owns several GPUs. Skipped where there are fewer than two."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.train
import torch
import torch.nn.functional as F

import raypar
from models import CNN

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that CUDA can use")


def test_a_workers_gpus_train_as_plain_pytorch(tmp_path: Path) -> None:
    """The rows are split over the GPUs. Batches that two devices share unequally."""

    def train_loop() -> None:
        replica = raypar.parallelize(
            CNN,
            loss_fn=F.cross_entropy,
            optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        )
        generator = torch.Generator().manual_seed(1)
        for rows in (64, 63, 1):
            images = torch.randn(rows, 1, 28, 28, generator=generator)
            step = replica.train_step(images, torch.randint(0, 10, (rows,), generator=generator))
        raypar.report({"loss": step.loss, "second": torch.cuda.max_memory_allocated(1)}, replica)

    result = raypar.Trainer(
        train_loop,
        plan=raypar.Plan(data_strategy="scatter"),
        run_config=ray.train.RunConfig(name="scatter", storage_path=str(tmp_path)),
        scaling_config=ray.train.ScalingConfig(use_gpu=True, resources_per_worker={"CPU": 1, "GPU": 2}),
    ).fit()
    assert result.metrics is not None
    assert result.metrics["second"] > 0, "the second GPU has computed"
    assert result.checkpoint is not None
    found = raypar.read_state_dict(result.checkpoint)

    torch.manual_seed(0)
    plain = CNN().cuda()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for rows in (64, 63, 1):
        images = torch.randn(rows, 1, 28, 28, generator=generator).cuda()
        labels = torch.randint(0, 10, (rows,), generator=generator).cuda()
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(found[name], weight.cpu(), atol=1e-4, rtol=1e-3)
