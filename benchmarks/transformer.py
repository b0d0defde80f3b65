"""The model of the benchmarks, and a batch for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


def transformer(layers: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(layers)))


def batch(config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (config["microbatches"] * config["rows"], config["tokens"], config["width"])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
