"""The main job on a GPU, through the same script and the same calls. Skipped on machines without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import ray.train
import torch
import torch.nn.functional as F

import raypar
import train_digits
from models import CNN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use")


def test_the_main_job_trains_the_cnn_on_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "15", "--storage", str(tmp_path), "--digits", "data/digits"]
    assert train_digits.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cuda" in printed
    accuracy = float(printed.rpartition("test accuracy ")[2].split("%")[0])
    assert accuracy >= 97.0


def test_two_stages_on_one_gpu_train_as_plain_pytorch_does(tmp_path: Path) -> None:
    """Placement [0, 0]: NCCL refuses two ranks on one GPU, so both stages are on one actor."""

    def train_loop() -> None:
        replica = raypar.parallelize(
            CNN,
            loss_fn=F.cross_entropy,
            optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
            split=["conv2"],
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            images = torch.randn(64, 1, 28, 28, generator=generator)
            step = replica.train_step(images, torch.randint(0, 10, (64,), generator=generator))
        assert replica.describe()[0].device.startswith("cuda")
        raypar.report({"loss": step.loss}, replica)

    plan = raypar.Plan(placement=[0, 0], microbatches=4)
    run_config = ray.train.RunConfig(name="two-stages", storage_path=str(tmp_path))
    result = raypar.Trainer(train_loop, plan=plan, run_config=run_config).fit()
    assert result.checkpoint is not None
    found = raypar.read_state_dict(result.checkpoint)

    torch.manual_seed(0)
    plain = CNN().cuda()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        images = torch.randn(64, 1, 28, 28, generator=generator).cuda()
        labels = torch.randint(0, 10, (64,), generator=generator).cuda()
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    for name, weight in plain.state_dict().items():
        # cuDNN adds in an order of its own for each batch size, so this is looser than on a CPU
        torch.testing.assert_close(found[name], weight.cpu(), atol=1e-4, rtol=1e-3)
