"""Random numbers belong to the work, not to the process.

Before each forward pass the generators are seeded from what the pass computes: the run's seed, the step, the
micro-batch (counted over all replicas) and the stage. Repeating or recomputing a step, in any process, then draws the
same numbers, dropout included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers; splitmix64 (Steele, Lea and Flood 2014) after each."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_all(value: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy and torch.

    device: None seeds torch on the CPU and on every GPU, as torch.manual_seed does; a device, the CPU and that one.
    """
    random.seed(value)
    np.random.seed(value % 2**32)
    if device is None:
        torch.manual_seed(value)
        return
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)


def seed_loop(replica: int) -> None:
    """Seed what the train loop of a replica draws itself: the same in every run, different on each replica."""
    seed_all(mixed_seed(0, replica))


def seed_pass(device: torch.device, seed: int, step: int, microbatch: int, stage: int) -> None:
    """Seed what one forward pass may draw from: the generators of Python, NumPy, and torch on the CPU and `device`."""
    seed_all(mixed_seed(seed, step, microbatch, stage), device)


def save_state() -> Any:
    """The state of the global generators of Python, NumPy and torch, for `restore_state`."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def restore_state(state: Any) -> None:
    cpu, cuda, numpy, python = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(numpy)
    random.setstate(python)


@contextmanager
def kept() -> Iterator[Any]:
    """Restore the global generators after the block, whatever it drew or seeded; yields their state before it."""
    state = save_state()
    try:
        yield state
    finally:
        restore_state(state)


def plain_state() -> dict[str, Any]:
    """The state of the global generators as tensors, lists and numbers only, so that a file can hold it safely."""
    cpu, cuda, numpy, python = save_state()
    return {"torch": cpu, "cuda": cuda, "numpy": [*numpy[:1], numpy[1].tolist(), *numpy[2:]], "python": list(python)}


def restore_plain_state(plain: dict[str, Any]) -> None:
    numpy, python = plain["numpy"], plain["python"]
    cuda = plain["cuda"] if torch.cuda.is_available() else None
    numpy = (numpy[0], np.array(numpy[1], dtype=np.uint32), *numpy[2:])
    restore_state((plain["torch"], cuda, numpy, (python[0], tuple(python[1]), python[2])))
