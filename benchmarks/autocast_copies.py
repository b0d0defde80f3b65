"""How many 16-bit copies of a stage's weights the micro-batches in flight hold under Plan(precision="bf16").

Autocast casts a weight once per context. With a context per pass, each micro-batch in flight has copies of its own,
which its graph keeps for the backward pass; with one context around the step all micro-batches share one.

    python benchmarks/autocast_copies.py
"""

from __future__ import annotations

import contextlib
import gc

import torch
from engines import engines_of
from torch import nn

from raypar.planning.plan import Plan
from raypar.stages.stage import Stage

WIDTH, LAYERS, MICROBATCHES = 512, 6, 4


def model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def copies(stage: Stage) -> list[torch.Tensor]:
    """The 16-bit tensors of a weight's shape that the graphs of a stage keep, each storage once."""
    gc.collect()
    by_storage: dict[int, torch.Tensor] = {}
    seen: set[object] = set()
    nodes = [tensor.grad_fn for saved in stage.saved.values() for made in saved.made.values() for tensor in made]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and value.shape == (WIDTH, WIDTH):
                by_storage[value.untyped_storage().data_ptr()] = value
        nodes += [following for following, _ in node.next_functions]
    return list(by_storage.values())


def main() -> None:
    torch.set_num_threads(1)
    plan = Plan(pipeline=2, microbatches=MICROBATCHES, precision="bf16")
    for name, around_step in (("a context per pass", contextlib.nullcontext()), ("one context around the step", None)):
        stage = engines_of(plan, model, [str(LAYERS // 2)])[0].part.stages[0]
        with around_step or torch.autocast("cpu", torch.bfloat16):
            for number in range(MICROBATCHES):
                stage.forward(number, torch.randn(4, WIDTH), {}, None, 4)
                weights = copies(stage)
                size = sum(weight.nbytes for weight in weights) / 2**20
                print(f"{name}: {len(weights)} copies, {size:.1f} MiB, with {number + 1} micro-batches in flight")


if __name__ == "__main__":
    main()
