"""Tensors of which a process holds one shard, torch's DTensor: parameters, gradients, optimizer state under fsdp."""

from __future__ import annotations

from typing import Any

import torch


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; without importing that class, which takes a second and only fsdp needs."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, or the tensor itself; without autograd, on the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. If it is sharded, all processes that hold a shard must make this call alike."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(like: torch.Tensor, tensor: Any) -> Any:
    """A whole tensor of the shape of `like`, sharded as `like` is; anything else as it is. Nothing is sent."""
    fits = is_shard(like) and isinstance(tensor, torch.Tensor) and not is_shard(tensor) and tensor.shape == like.shape
    if not fits:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)
