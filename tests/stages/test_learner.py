from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar.errors import CheckpointError, ModelError
from raypar.splitting.model import ModelSpec
from raypar.stages.learner import Learner
from raypar.stages.model_part import ModelPart

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def learner(
    module: nn.Module,
    optimizer: MakeOptimizer | None = None,
    lr_scheduler: MakeScheduler | None = None,
    max_grad_norm: float | None = None,
) -> Learner:
    made = optimizer or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1))
    spec = ModelSpec(lambda: module, F.mse_loss, made, lr_scheduler, max_grad_norm)
    return Learner(ModelPart(module, {}, {}, {}, {}), spec)


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def step(found: Learner, seed: int, weight: float = 1.0) -> tuple[float | None, float]:
    give_gradients(found.module, seed)
    return found.commit(weight, found.squared_norm())


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


# ---------------------------------------------------------------- the commit


def test_gradient_sums_are_divided_by_the_weight_once():
    ours, plain = model(), model()
    found = learner(ours, lambda m: torch.optim.SGD(m.parameters(), lr=0.5))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    step(found, seed=1, weight=8.0)
    give_gradients(plain, seed=1)
    for parameter in plain.parameters():
        assert parameter.grad is not None
        parameter.grad /= 8.0
    optimizer.step()
    assert equal(ours, plain)


def test_what_a_commit_returns():
    """The learning rate that it used, and the norm of the mean gradient."""
    found = learner(model(), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    give_gradients(found.module, 1)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in found.module.parameters() if p.grad is not None))
    lr, reported = found.commit(4.0, found.squared_norm())
    assert lr == 0.1
    assert reported == pytest.approx(norm / 4)
    assert step(found, 2)[0] == 0.05
    assert step(found, 3)[0] == 0.025


def test_clipping_is_that_of_torch():
    """By the norm that the commit is given."""
    ours, plain = model(), model()
    found = learner(ours, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), max_grad_norm=0.5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    _, norm = step(found, seed=1, weight=2.0)
    give_gradients(plain, seed=1)
    for parameter in plain.parameters():
        assert parameter.grad is not None
        parameter.grad /= 2.0
    plain_norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    assert norm == pytest.approx(float(plain_norm))
    for ours_p, plain_p in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours_p, plain_p, rtol=0, atol=1e-6)


def test_a_gradient_below_the_limit_is_not_clipped():
    ours, free = model(), model()
    step(learner(ours, max_grad_norm=1e6), seed=1)
    step(learner(free), seed=1)
    assert equal(ours, free)


def test_a_step_without_weight_changes_nothing():
    """Its scheduler does not advance either."""
    ours = model()
    found = learner(ours, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    lr, norm = step(found, seed=1, weight=0.0)
    assert (lr, norm) == (0.1, 0.0)
    assert equal(ours, model())
    assert step(found, seed=2)[0] == 0.1


def test_gradients_are_gone_after_a_commit():
    found = learner(model())
    step(found, seed=1)
    assert [p.grad for p in found.module.parameters()] == [None] * 6


def test_a_part_with_nothing_to_train():
    """It has no optimizer, and still takes part in the commit."""
    frozen = nn.Linear(2, 2).requires_grad_(False)

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        raise AssertionError("called")

    found = learner(frozen, optimizer)
    assert found.squared_norm() == 0.0
    assert found.commit(2.0, 9.0) == (None, 1.5)
    assert found.state() == {"optimizer": {}, "scheduler": None, "loss_scale": None}
    found.load_state({"optimizer": {"elsewhere": {}}, "scheduler": None})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "found LBFGS, which evaluates the whole model several times"),
        (lambda m: m.parameters(), r"optimizer\(module\) returned generator, needed a torch\.optim\.Optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer: Any, message: str):
    """An optimizer must work parameter by parameter."""
    with pytest.raises(ModelError, match=message):
        learner(model(), optimizer)


def test_a_scheduler_that_needs_a_metric_is_refused():
    with pytest.raises(ModelError, match="found ReduceLROnPlateau, which needs a metric at each step"):
        learner(model(), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


# ---------------------------------------------------------------- groups by name and by type


def decay_by_name(module: nn.Module) -> torch.optim.Optimizer:
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    others = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.5}, {"params": biases, "lr": 0.3}], lr=0.1)


def norms_apart_by_type(module: nn.Module) -> torch.optim.Optimizer:
    norms = [p for m in module.modules() if isinstance(m, nn.BatchNorm1d) for p in m.parameters()]
    others = [p for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
    return torch.optim.SGD([{"params": others, "momentum": 0.9}, {"params": norms, "lr": 0.01}], lr=0.1)


def with_names(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.named_parameters(), lr=0.1)


MAKERS: list[MakeOptimizer] = [
    decay_by_name,
    norms_apart_by_type,
    with_names,
    lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    lambda m: torch.optim.Adagrad(m.parameters()),
    lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, amsgrad=True),
]


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)


@pytest.mark.parametrize("optimizer", MAKERS)
def test_a_resumed_optimizer_steps_identically(optimizer: MakeOptimizer):
    """Bitwise, from its saved state."""
    ours, again = model(), model()
    found = learner(ours, optimizer, cosine)
    for number in range(3):
        step(found, number)
    saved = pickle.loads(pickle.dumps(found.state()))
    again.load_state_dict(ours.state_dict())
    resumed = learner(again, optimizer, cosine)
    resumed.load_state(saved)
    for number in range(3, 6):
        assert step(found, number) == step(resumed, number)
        assert equal(ours, again)


@pytest.mark.parametrize("optimizer", MAKERS)
def test_state_moves_to_another_split(optimizer: MakeOptimizer):
    """The states of two parts together are that of the whole, and load into parts that are split elsewhere."""
    whole = model()
    cut_late, cut_early = [model(), model()], [model(), model()]
    for parts, at in ((cut_late, 3), (cut_early, 1)):
        for index in range(4):
            del parts[index < at]._modules[str(index)]  # type: ignore[arg-type]

    def steps(found: list[Learner], numbers: range) -> None:
        for number in numbers:
            for each in found:
                by_name = dict(each.module.named_parameters())
                give_gradients(gradients := model(), number)
                for name, parameter in gradients.named_parameters():
                    if name in by_name:
                        by_name[name].grad = parameter.grad
                each.commit(1.0, 0.0)

    plain, late = [learner(whole, optimizer, cosine)], [learner(part, optimizer, cosine) for part in cut_late]
    steps(plain, range(3))
    steps(late, range(3))
    states = [each.state() for each in late]
    merged = {"optimizer": states[0]["optimizer"] | states[1]["optimizer"], "scheduler": states[0]["scheduler"]}
    early = [learner(part, optimizer, cosine) for part in cut_early]
    for each in early:
        each.module.load_state_dict({name: whole.state_dict()[name] for name in each.module.state_dict()})
        each.load_state(merged)
    steps(plain, range(3, 6))
    steps(early, range(3, 6))
    for each in early:
        for name, value in each.module.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name])
    for each in early:
        names = [name for group in each.optimizer.param_groups for name in group.get("param_names", [])]  # type: ignore[union-attr]
        assert not names or names == list(dict(each.module.named_parameters()))


def groups_that_are_not_empty(module: nn.Module) -> torch.optim.Optimizer:
    """A part without a bias has one group, a part of biases alone has the other one, most parts have both."""
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    others = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    return torch.optim.SGD([{"params": group, "lr": lr} for group, lr in ((others, 0.1), (biases, 0.5)) if group])


@pytest.mark.parametrize(
    "make",
    [
        cosine,
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
            ],
            [2],
        ),
    ],
)
def test_parts_keep_the_rates_of_their_groups(make: MakeScheduler):
    """Also parts that have other groups than the saved one."""

    def parts() -> list[Learner]:
        both, weight, bias = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        bias.weight.requires_grad_(False)
        return [
            learner(nn.ModuleDict({f"{n}": m}), groups_that_are_not_empty, make)
            for n, m in enumerate((both, weight, bias))
        ]

    def rates(found: list[Learner], steps: int) -> list[list[float]]:
        for number in range(steps):
            for each in found:
                step(each, number)
        return [[group["lr"] for group in each.optimizer.param_groups] for each in found]  # type: ignore[union-attr]

    plain = parts()
    rates(plain, 3)
    states = [each.state() for each in plain]
    optimizer = {name: entry for state in states for name, entry in state["optimizer"].items()}
    for saved in states:
        resumed = parts()
        for each in resumed:
            each.load_state({"optimizer": optimizer, "scheduler": saved["scheduler"]})
        assert rates(resumed, 0) == [[group["lr"] for group in e.optimizer.param_groups] for e in plain]  # type: ignore[union-attr]
        expected = parts()
        assert rates(resumed, 2) == rates(expected, 5)


def test_the_state_is_by_parameter_name():
    found = learner(model(), decay_by_name)
    step(found, 1)
    state = found.state()["optimizer"]
    assert sorted(state) == sorted(name for name, _ in model().named_parameters())
    assert state["0.weight"]["options"]["weight_decay"] == 0.5
    assert state["3.bias"]["options"]["lr"] == 0.3
    assert set(state["0.weight"]["state"]) == {"step", "exp_avg", "exp_avg_sq"}


def rates_by_group(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [p], "lr": 0.1 if name.startswith("0") else 0.01} for name, p in module.named_parameters()],
        momentum=0.9,
    )


def cyclic(optimizer: torch.optim.Optimizer) -> Any:
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.CyclicLR(optimizer, [rate / 10 for rate in rates], rates, 3)


def chained_cyclic(optimizer: torch.optim.Optimizer) -> Any:
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return torch.optim.lr_scheduler.ChainedScheduler([cyclic(optimizer), constant])


def halves(at: int) -> list[nn.Module]:
    parts: list[nn.Module] = [model(), model()]
    for index in range(4):
        del parts[index < at]._modules[str(index)]
    return parts


@pytest.mark.parametrize("make", [cyclic, chained_cyclic])
@pytest.mark.parametrize("at", [3, 1])
def test_a_scheduler_with_group_values_resumes(make: MakeScheduler, at: int):
    """Each actor once got the first one's max_lrs: other rates where its groups were as many, a ValueError of torch
    where they were not."""

    def rates(found: list[Learner]) -> dict[str, float]:
        return {name: entry["options"]["lr"] for each in found for name, entry in each.state()["optimizer"].items()}

    before, plain = ([learner(part, rates_by_group, make) for part in halves(3)] for _ in range(2))
    for number in range(2):
        for each in before + plain:
            step(each, number)
    states = [each.state() for each in before]
    merged = {"optimizer": states[0]["optimizer"] | states[1]["optimizer"], "scheduler": states[0]["scheduler"]}
    resumed = [learner(part, rates_by_group, make) for part in halves(at)]
    for each in resumed:
        each.load_state(pickle.loads(pickle.dumps(merged)))
    for number in range(2, 8):
        assert rates(resumed) == rates(plain)
        for each in resumed + plain:
            step(each, number)
    assert len(set(rates(plain).values())) == 2


def test_groups_that_cannot_be_mapped_are_refused():
    found = learner(model(), rates_by_group, cyclic)
    step(found, 1)
    with pytest.raises(CheckpointError, match=r"values of '\w+' that differ among the parameters of one group here"):
        learner(model(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), cyclic).load_state(
            found.state()
        )


def test_another_scheduler_is_refused():
    """If its groups need what was not saved."""
    found = learner(model(), rates_by_group, chained_cyclic)

    def longer(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ChainedScheduler([cyclic(optimizer)])

    with pytest.raises(CheckpointError, match="2 schedulers in one, found 1"):
        learner(model(), rates_by_group, longer).load_state(found.state())


def test_another_optimizer_is_refused():
    """It was a KeyError of torch's at the first step: SGD keeps no 'exp_avg'."""
    found = learner(model(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    step(found, 1)
    with pytest.raises(CheckpointError, match=r"for the parameter '0\.weight' is SGD, found AdamW; needed: optimizer="):
        learner(model()).load_state(found.state())


def head_only(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for name, p in module.named_parameters() if name.startswith("3")], lr=0.1)


def test_an_optimizer_of_nothing_here():
    """optimizer= is called with each actor's part: over the head alone it failed on the actors without the head, where
    one optimizer over the whole model works."""
    body, head = halves(3)
    owner = {name: int(name.startswith("3")) for name in model().state_dict()}
    spec = ModelSpec(lambda: body, F.mse_loss, head_only, cosine)
    first = Learner(ModelPart(body, {}, owner, {}, {}), spec)
    last = Learner(ModelPart(head, {}, owner, {}, {}), spec)
    kept = {name: value.clone() for name, value in body.state_dict().items()}
    assert step(first, 1)[0] is None
    assert step(last, 1)[0] == 0.1
    assert all(torch.equal(value, kept[name]) for name, value in body.state_dict().items())
    first.load_state(last.state())
    assert first.state() == {"optimizer": {}, "scheduler": None, "loss_scale": None}


def test_an_optimizer_of_nothing_is_an_error():
    """An optimizer that selects nothing of the whole model is an error, as in plain PyTorch."""
    with pytest.raises(ValueError, match="empty parameter list"):
        learner(model(), lambda m: torch.optim.SGD([], lr=0.1))


def test_a_state_that_lacks_a_parameter_is_refused():
    found = learner(model())
    step(found, 1)
    state = found.state()
    del state["optimizer"]["3.bias"]
    with pytest.raises(CheckpointError, match=r"no optimizer state for the parameter '3\.bias'"):
        learner(model()).load_state(state)


# ---------------------------------------------------------------- a step that is dropped


def test_a_dropped_step_changes_nothing():
    """Buffers and weights are as they were."""
    ours = model()
    found = learner(ours)
    for number in range(3):
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        found.begin()
        ours(torch.rand(5, 3)).sum().backward()
        assert not torch.equal(ours[1].running_mean, before["1.running_mean"])  # type: ignore[arg-type]
        if number == 1:  # as after a committed step: the buffers stay
            found.commit(0.0, 0.0)
        else:
            found.drop_step()
            assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
        assert [p.grad for p in ours.parameters()] == [None] * 6


def test_a_step_can_be_dropped_twice():
    """The search for what was not finite runs the dropped step again."""
    ours = model()
    found = learner(ours)
    found.begin()
    for _ in range(2):
        ours(torch.rand(5, 3))
        found.drop_step()
        assert ours[1].num_batches_tracked == 0
        assert ours[1].running_mean.tolist() == [0.0] * 4  # type: ignore[operator, union-attr]


def test_a_replaced_buffer_is_restored_too():
    """A buffer that forward replaces instead of changing it in place."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + len(x)
            return x * self.weight

    ours = Counts()
    found = learner(ours)
    for expected in (0, 5, 10):
        found.begin()
        ours(torch.rand(2))
        found.drop_step()
        assert ours.seen == expected
        found.begin()
        ours(torch.rand(5))
        found.commit(0.0, 0.0)


# ---------------------------------------------------------------- modes


def test_training_mode_is_that_of_the_build():
    ours = model()
    ours[1].eval()  # a frozen batch norm
    found = learner(ours)
    found.set_mode(False)
    assert not any(module.training for module in ours.modules())
    found.set_mode(True)
    assert [module.training for module in ours.modules()] == [True, True, False, True, True]


class Master(torch.optim.Optimizer):
    """Keeps the weights and their momentum in float32, and counts in whole numbers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["master"], state["momentum"] = parameter.float(), torch.zeros_like(parameter.float())
                state["age"] = torch.zeros(parameter.shape, dtype=torch.int64)
            state["age"] += 1
            state["momentum"].mul_(0.9).add_(parameter.grad.float())
            state["master"] -= 0.01 * state["momentum"]
            parameter.copy_(state["master"])


def test_state_keeps_its_own_type():
    """torch's load_state_dict casts all state to the parameter's type. Runs in bfloat16 with float32 master weights did
    not end with the bits of those that never stopped."""
    ours, again = model().bfloat16(), model().bfloat16()
    found, resumed = learner(ours, lambda m: Master(m.parameters())), learner(again, lambda m: Master(m.parameters()))

    def give(module: nn.Module, seed: int) -> None:
        give_gradients(module.float(), seed)
        gradients = [p.grad for p in module.parameters()]
        module.bfloat16()
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            assert gradient is not None
            parameter.grad = gradient.bfloat16()

    give(ours, 1)
    found.commit(1.0, found.squared_norm())
    resumed.load_state(pickle.loads(pickle.dumps(found.state())))
    again.load_state_dict(ours.state_dict())
    state = resumed.state()["optimizer"]["0.weight"]["state"]
    assert {key: value.dtype for key, value in state.items()} == {
        "master": torch.float32, "momentum": torch.float32, "age": torch.int64,
    }  # fmt: skip
    for each in (found, resumed):
        give(each.module, 2)
        each.commit(1.0, each.squared_norm())
    assert equal(ours, again)
