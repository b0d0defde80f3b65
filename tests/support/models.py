"""Models of real structure, small enough for a test: a U-Net, a ResNet-18, and GPT-2 and Llama from transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WORDS = 32


class TwoConvolutions(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, out, 3, padding=1)
        self.norm = nn.GroupNorm(2, out)
        self.two = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.norm(self.one(x)))))


class UNet(nn.Module):
    """Ronneberger, Fischer and Brox 2015 (https://arxiv.org/abs/1505.04597), three levels deep. Each level's features
    go to the other side of the U: the first ones past all other modules."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.down1 = TwoConvolutions(1, width)
        self.down2 = TwoConvolutions(width, 2 * width)
        self.down3 = TwoConvolutions(2 * width, 4 * width)
        self.bottom = TwoConvolutions(4 * width, 8 * width)
        self.rise3 = nn.ConvTranspose2d(8 * width, 4 * width, 2, stride=2)
        self.up3 = TwoConvolutions(8 * width, 4 * width)
        self.rise2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = TwoConvolutions(4 * width, 2 * width)
        self.rise1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = TwoConvolutions(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.down3(F.max_pool2d(second, 2))
        x = self.bottom(F.max_pool2d(third, 2))
        x = self.up3(torch.cat([third, self.rise3(x)], dim=1))
        x = self.up2(torch.cat([second, self.rise2(x)], dim=1))
        x = self.up1(torch.cat([first, self.rise1(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """He, Zhang, Ren and Sun 2015 (https://arxiv.org/abs/1512.03385), with torchvision's names; `width` is 64 there."""

    def __init__(self, width: int = 64, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def gpt2(*, dropout: float = 0.0, tied: bool = False, layers: int = 2, **more: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=16,
        n_embd=8,
        n_layer=layers,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )
    return GPT2LMHeadModel(config)


def llama(*, layers: int = 2, **more: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS,
        max_position_embeddings=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        **({"use_cache": False, "tie_word_embeddings": False} | more),
    )
    return LlamaForCausalLM(config)


def next_words(output: Any, words: Tensor) -> Tensor:
    """The mean loss of predicting the words, given a language model's output."""
    return F.cross_entropy(output.logits.flatten(0, 1), words.flatten())


class WithOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flip: bool = False) -> Tensor:
        y = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        return -y if flip else y


class AsksForLength(nn.Module):
    """A branch on a size, which torch.fx cannot trace and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) if x.shape[1] > 3 else x)  # type: ignore[no-any-return]
