from __future__ import annotations

import torch
from torch import nn

from models import CNN, mlp


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim > 1}


def test_the_mlp_is_784_512_256_10():
    assert list(shapes(mlp()).values()) == [(512, 784), (256, 512), (10, 256)]


def test_the_cnn_has_two_convolutions_and_two_linear_layers():
    assert shapes(CNN()) == {
        "conv1.weight": (32, 1, 3, 3),
        "conv2.weight": (64, 32, 3, 3),
        "fc1.weight": (128, 3136),
        "fc2.weight": (10, 128),
    }


def test_the_cnn_computes_what_its_layers_in_a_row_compute():
    torch.manual_seed(0)
    model, images = CNN(), torch.rand(3, 1, 28, 28)
    row = nn.Sequential(
        model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), model.fc1, nn.ReLU(), model.fc2,
    )  # fmt: skip
    assert torch.equal(model(images), row(images))


def test_both_take_the_same_images():
    for model in (mlp(), CNN()):
        assert model(torch.rand(5, 1, 28, 28)).shape == (5, 10)
