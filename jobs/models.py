"""The two reference models, in plain PyTorch: whether and how they are split into stages is up to the plan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Sequential:
    """784 → 512 → 256 → 10 with ReLU between; takes images of any shape with 784 values."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


class CNN(nn.Module):
    """Two convolutions and two linear layers for images of 1 × 28 × 28.

    What has no weights (ReLU, pooling, flattening) is called in `forward` between the modules, as people write it;
    splitting the model must keep that code with the stage it belongs to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (rows, 1, 28, 28) to logits (rows, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)  # 28 → 14
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # 14 → 7
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits
