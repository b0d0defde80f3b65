"""Random models, cuts, placements, schedules and batches: each step equals that of the plain model.

A model is a random wiring of blocks: a value may be used by several later blocks, near and far, blocks return tensors,
tuples, dicts and masks, some have no parameters, some share a weight, use one twice, or one of another block by hand. A
schedule is one of raypar's, or a random order of the actions that respects what must come before what.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.engine.microbatch import sizes
from raypar.planning.plan import Plan
from raypar.planning.schedule import Action, dependencies
from raypar.stages import two_backward
from support.cases import slow
from support.engines import Engines, request_of, spec_of
from support.nccl_rules import NcclWorld

SEEDS = [*range(3), *(slow(seed) for seed in range(3, 12))]
CASES_A_SEED, WIDTH = 25, 4  # twice: 600 cases, 150 of them in `make test`, but for those without a row


class Block(nn.Module):
    """One of several kinds; all take a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind != "bare":
            self.linear = nn.Linear(WIDTH, WIDTH)
        if kind == "twice":
            self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "bare":
            return torch.tanh(x)
        if self.kind == "in place":
            return self.linear(F.relu(x + 0.1)).mul_(0.5).tanh()
        y = torch.tanh(self.linear(x))
        if self.kind == "twice":
            return self.norm(torch.tanh(self.linear(self.norm(y)))) * self.linear.bias.exp()
        if self.kind == "tuple":
            return y, x.detach() * 0.1
        if self.kind == "dict":
            return {"y": y, "skip": [x * 0.3]}
        if self.kind == "mask":
            return y, x.detach() > 0
        return y


class Wiring(nn.Module):
    """`sources[i]`: the values (0 is the input) whose sum block i takes."""

    def __init__(self, kinds: Sequence[str], sources: Sequence[Sequence[int]], tied: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.kinds, self.sources = list(kinds), [list(each) for each in sources]
        for index, kind in enumerate(kinds):
            setattr(self, f"block{index}", Block(kind))
        for one, other in tied:
            getattr(self, f"block{other}").linear.weight = getattr(self, f"block{one}").linear.weight

    def forward(self, x: Tensor) -> Tensor:
        values, masks = [x], []
        for index, kind in enumerate(self.kinds):
            taken = values[self.sources[index][0]]
            for source in self.sources[index][1:]:
                taken = taken + values[source]
            found = getattr(self, f"block{index}")(taken)
            if kind == "tuple":
                found = found[0] + found[1]
            elif kind == "dict":
                found = found["y"] + found["skip"][0]
            elif kind == "mask":
                masks.append(found[1])
                found = found[0]
            elif kind == "by hand":  # the weight of the first block, beside its module
                found = found * self.block0.linear.bias
            values.append(found)
        return torch.where(masks[0], values[-1], values[-1] * 0.5) if masks else values[-1]


def random_order(placement: Sequence[int], microbatches: int, chance: Random) -> list[list[str]]:
    """A random table: again and again a random actor takes a random action that is ready."""
    stages = range(len(placement))
    cut = {(s, m) for s in stages for m in range(microbatches) if chance.random() < 0.4}
    left = {
        Action(s, kind, m) for s in stages for m in range(microbatches) for kind in ("FIW" if (s, m) in cut else "FB")
    }
    rows: list[list[str]] = [[] for _ in range(max(placement) + 1)]
    done: set[Action] = set()
    while left:
        ready = sorted(a for a in left if done.issuperset(dependencies(a, len(placement), frozenset(cut))))
        action = chance.choice(ready)
        rows[placement[action.stage]].append(str(action))
        left.remove(action)
        done.add(action)
    return rows


@pytest.fixture(params=[0, two_backward.SMALL], ids=["large", "small"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are large enough to be left for the second part of a backward pass, or not."""
    monkeypatch.setattr(two_backward, "SMALL", request.param)


def random_case(chance: Random) -> tuple[Any, Plan, list[str], int]:
    blocks = chance.randint(2, 6)
    kinds = [
        chance.choice(["plain", "plain", "bare", "in place", "tuple", "dict", "twice", "mask", "by hand"])
        for _ in range(blocks)
    ]
    kinds[0] = "plain"  # something to train
    sources = [sorted({index, *chance.sample(range(index + 1), chance.randint(0, index))}) for index in range(blocks)]
    linear = [index for index, kind in enumerate(kinds) if kind != "bare"]
    tied = [(min(pair), max(pair)) for pair in [chance.sample(linear, 2)]] if len(linear) > 2 else []
    tied = tied if chance.random() < 0.4 else []
    stages = chance.randint(2, blocks)
    split = sorted(chance.sample(range(1, blocks), stages - 1))
    actors = chance.randint(1, stages)
    placement = [*range(actors), *(chance.randrange(actors) for _ in range(stages - actors))]
    chance.shuffle(placement)
    microbatches = chance.randint(1, 5)
    name = chance.choice(["gpipe", "1f1b", "zb-h1", "own", "own"])
    order = chance.randrange(2**30)
    if stages % 2 == 0 and chance.random() < 0.5:  # each actor holds two stages
        actors = stages // 2
        name = chance.choice(["interleaved", "zbv", "own"])
        placement = [*range(actors), *(reversed(range(actors)) if name == "zbv" else range(actors))]
    schedule: Any = name if name != "own" else lambda where, count: random_order(where, count, Random(order))
    plan = Plan(
        data=chance.choice([1, 1, 2]),
        pipeline=actors,
        placement=tuple(placement),
        microbatches=microbatches,
        schedule=schedule,
        recompute=chance.choice(["never", "never", "always", "except_last"]),
    )
    return lambda: Wiring(kinds, sources, tied), plan, [f"block{index}" for index in split], chance.randint(0, 9)


def plain_step(
    build: Any, shares: Sequence[tuple[Tensor, Tensor]], microbatches: int
) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, total = sum(len(x) for x, _ in shares), 0.0
    for x, y in shares:
        parts = sizes(len(x), microbatches)
        for part, target in zip(x.split(parts) if parts else [], y.split(parts) if parts else [], strict=True):
            loss = F.mse_loss(model(part), target) * len(part)
            loss.backward()
            total += loss.item()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= rows
    if rows:
        optimizer.step()
    return total / rows if rows else float("nan"), model.state_dict()


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_of_a_random_pipeline_is_that_of_the_plain_model(seed: int):
    chance = Random(seed)
    for number in range(CASES_A_SEED):
        build, plan, split, rows = random_case(chance)
        numbers = torch.Generator().manual_seed(1000 * seed + number)
        shares = [
            (torch.randn(size, WIDTH, generator=numbers), torch.randn(size, WIDTH, generator=numbers))
            for size in [rows, chance.randint(1, 6)][: plan.data]
        ]
        if plan.data == 1 and not rows:
            continue
        world = NcclWorld(plan, seed=number) if chance.random() < 0.5 else None
        spec = spec_of(build, split, loss_fn=F.mse_loss)
        engines = Engines(plan, spec, world, world.drive) if world is not None else Engines(plan, spec)
        results = engines.drive([engine.train_step(request_of(1, shares[engine.replica])) for engine in engines.all])
        loss, needed = plain_step(build, shares, plan.microbatch_count)
        assert results[0].loss == pytest.approx(loss, abs=1e-6), (seed, number, plan)
        for engine in engines.all:
            for name, tensor in engine.part.module.state_dict().items():
                torch.testing.assert_close(
                    tensor, needed[name], atol=1e-6, rtol=0, msg=f"{seed} {number} {plan} {name}"
                )
            assert not any(stage.saved or stage.arrived or stage.deferred for stage in engine.part.stages.values())
        assert world is None or world.is_empty()
