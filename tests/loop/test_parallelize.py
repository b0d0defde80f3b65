from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models import CNN
from raypar.checkpoint.manifest import newest_checkpoint
from raypar.checkpoint.weights import read_state_dict
from raypar.engine.microbatch import shared
from raypar.errors import CheckpointError, DataError, ModelError, NonFiniteError, SplitError, UsageError, UserCodeError
from raypar.loop import local
from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import Replica, report
from raypar.loop.session import RunSpec, current, epochs
from raypar.observe.actor_info import ActorInfo
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage
from support.saved import same_values, saved_values

ROWS, BATCH, EPOCHS = 44, 16, 2
STEPS = 6  # of 16, 16 and 12 rows, twice
FEATURES = 4

PLANS = [
    Plan(microbatches=2),
    Plan(data=2),
    Plan(pipeline=2, microbatches=3),
    Plan(data=2, pipeline=2, microbatches=2),
    Plan(pipeline=2, placement=[0, 1, 0], microbatches=2, schedule="gpipe"),
]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.data}x{p.pipeline}-{len(p.actor_of_stage)}")


class Crash(Exception):
    """What ends a loop in the midst of a run."""


def stateful() -> nn.Module:
    """A model with all that must be saved: weights, buffers that each replica has for itself, dropout."""
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)
    )


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def split_of(plan: Plan) -> list[str] | None:
    return {1: None, 2: ["3"], 3: ["2", "4"]}[len(plan.actor_of_stage)]


class Runs:
    """Runs in one folder, each going on from the newest checkpoint of those before it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.storage = Storage.open(folder, "run")
        self.folder, self.plan = folder, plan
        self.states: dict[int, dict[str, Tensor]] = {}
        self.losses: list[float] = []

    def __call__(self, loop: Callable[[], None], plan: Plan | None = None, **options: Any) -> list[dict[str, Any]]:
        paths = {"train": self.folder / "train.parquet"}
        return run_local(RunSpec(loop, plan or self.plan, paths, Timeouts(), self.storage), **options)

    def train(
        self, build: Callable[[], nn.Module] = stateful, crash_after: int | None = None, plan: Plan | None = None
    ) -> list[dict[str, Any]]:
        """Trains to the end, with one checkpoint per epoch, or up to step `crash_after`, which it saves."""
        self.losses = []

        def loop() -> None:
            replica = make_replica(build, plan or self.plan)
            for _ in epochs(EPOCHS):
                metrics: dict[str, Any] = {}
                for batch in batches("train", batch_size=BATCH):
                    step = replica.train_step(batch["x"], batch["y"])
                    metrics = {"loss": step.loss, "lr": step.lr}
                    if rank() == 0:
                        self.losses.append(step.loss)
                    if step.step == crash_after:
                        report(metrics, replica)
                        raise Crash
                report(metrics, replica)
            self.states[rank()] = replica.state_dict()

        if crash_after is None:
            return self(loop, plan)
        with pytest.raises(Crash):
            self(loop, plan)
        return []


def rank() -> int:
    return current("the test").replica


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    others = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.1}, {"params": biases}], lr=0.01)


def make_replica(build: Callable[[], nn.Module], plan: Plan, **options: Any) -> Replica:
    defaults: dict[str, Any] = {
        "loss_fn": F.cross_entropy,
        "optimizer": adamw,
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
        "max_grad_norm": 1.0,
        "split": split_of(plan),
    }
    return parallelize(build, **(defaults | options))


def write_rows(folder: Path, change: Callable[[np.ndarray], None] | None = None) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
    if change is not None:
        change(x)
    y = pa.array(generator.integers(0, 3, ROWS))
    pq.write_table(pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x), "y": y}), folder / "train.parquet")


@pytest.fixture
def new_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Plan], Runs]:
    def make(plan: Plan) -> Runs:
        folder = tmp_path_factory.mktemp("runs")
        write_rows(folder)
        return Runs(folder, plan)

    return make


X = torch.randn(12, FEATURES, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def share(tensor: Tensor) -> Tensor:
    session = current("the test")
    return tensor.tensor_split(session.size)[session.replica]


def bits(states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, bytes]]:
    """All values of all replicas, to be compared to the last bit."""
    return {
        number: {name: value.numpy().tobytes() for name, value in state.items()} for number, state in states.items()
    }


# ---------------------------------------------------------------- a run, and a run that is resumed


@each_plan
def test_a_run_returns_the_history_of_its_metrics(new_runs: Callable[[Plan], Runs], plan: Plan):
    runs = new_runs(plan)
    history = runs.train()
    assert [(row["step"], row["epoch"]) for row in history] == [(3, 0), (6, 1)]
    assert [row["loss"] for row in history] == [runs.losses[2], runs.losses[5]]
    assert history[0]["lr"] > history[1]["lr"]


@each_plan
def test_runs_are_bitwise_reproducible(new_runs: Callable[[Plan], Runs], plan: Plan):
    one, other = new_runs(plan), new_runs(plan)
    one.train()
    torch.manual_seed(99)
    other.train()
    assert one.losses == other.losses
    assert bits(one.states) == bits(other.states)
    assert sorted(one.states) == list(range(plan.data))


@each_plan
@pytest.mark.parametrize("crash_after", [1, 3, 5])
def test_a_run_resumed_after_a_crash_is_identical(new_runs: Callable[[Plan], Runs], plan: Plan, crash_after: int):
    """Bitwise, to one that never crashed."""
    whole, broken = new_runs(plan), new_runs(plan)
    history = whole.train()
    broken.train(crash_after=crash_after)
    before = broken.losses
    resumed = broken.train()
    assert before + broken.losses == whole.losses
    assert bits(broken.states) == bits(whole.states)
    assert resumed[-1] == history[-1]
    ends = [saved_values(newest_checkpoint(runs.storage)) for runs in (whole, broken)]
    assert same_values(*ends)


def test_a_run_resumed_twice_too(new_runs: Callable[[Plan], Runs]):
    plan = Plan(data=2, pipeline=2, microbatches=2)
    whole, broken = new_runs(plan), new_runs(plan)
    whole.train()
    broken.train(crash_after=2)
    broken.train(crash_after=4)
    broken.train()
    assert bits(broken.states) == bits(whole.states)


def test_each_replica_keeps_buffers_of_its_own_through_a_resume(new_runs: Callable[[Plan], Runs]):
    runs = new_runs(Plan(data=2))
    runs.train()
    means = [runs.states[number]["1.running_mean"] for number in (0, 1)]
    assert not torch.equal(means[0], means[1])
    assert torch.equal(runs.states[0]["0.weight"], runs.states[1]["0.weight"])
    assert torch.equal(read_state_dict(newest_checkpoint(runs.storage))["1.running_mean"], means[0])


@pytest.mark.parametrize(
    "other", [Plan(), Plan(data=2), Plan(pipeline=2, placement=[0, 1, 0]), Plan(data=2, pipeline=2)]
)
def test_a_run_can_be_resumed_with_another_plan(new_runs: Callable[[Plan], Runs], other: Plan):
    whole, changed = new_runs(Plan(pipeline=2)), new_runs(Plan(pipeline=2))
    whole.train(plain)
    changed.train(plain, crash_after=3)
    changed.train(plain, plan=other)
    for name, value in whole.states[0].items():
        torch.testing.assert_close(changed.states[0][name], value, rtol=0, atol=1e-6)


def test_a_truncated_checkpoint_is_skipped(new_runs: Callable[[Plan], Runs]):
    whole, broken = new_runs(Plan()), new_runs(Plan())
    whole.train()
    broken.train(crash_after=2)
    broken.train(crash_after=4)
    newest = Path(str(newest_checkpoint(broken.storage)))
    (newest / "checkpoint.json").unlink()
    broken.train()
    assert len(broken.losses) == 3  # step 4 again, from the checkpoint of the first epoch's end
    assert bits(broken.states) == bits(whole.states)


# ---------------------------------------------------------------- evaluation


@each_plan
def test_evaluation_changes_nothing_in_training(new_runs: Callable[[Plan], Runs], plan: Plan):
    states: dict[bool, dict[int, dict[str, Tensor]]] = {False: {}, True: {}}

    def loop(evaluate: bool) -> Callable[[], None]:
        def train() -> None:
            replica = make_replica(stateful, plan)
            for _ in range(3):
                replica.train_step(share(X), share(Y))
                if evaluate:
                    replica.eval_step(share(X), share(Y))
                    replica.predict(share(X))
                    replica.state_dict()
                    replica.sum(1)
            states[evaluate][rank()] = replica.state_dict()

        return train

    for evaluate in (False, True):
        new_runs(plan)(loop(evaluate))
    assert bits(states[True]) == bits(states[False])


@each_plan
def test_evaluation_is_that_of_the_plain_model(new_runs: Callable[[Plan], Runs], plan: Plan):
    """eval_step and predict, in eval mode."""

    def loop() -> None:
        replica = make_replica(stateful, plan)
        model = stateful()
        model.load_state_dict(replica.state_dict())
        model.eval()
        output = replica.eval_step(share(X), share(Y))
        assert output.samples == 12
        assert output.loss == pytest.approx(F.cross_entropy(model(X), Y).item(), abs=1e-6)
        torch.testing.assert_close(replica.predict(share(X)), model(share(X)), rtol=0, atol=1e-6)
        assert tuple(replica.predict(X[:0]).shape) == (0, 3)

    new_runs(plan)(loop)


@each_plan
def test_a_number_is_added_over_all_replicas(new_runs: Callable[[Plan], Runs], plan: Plan):
    sums: list[tuple[Any, list[int]]] = []

    def loop() -> None:
        replica = make_replica(plain, plan)
        sums.append((replica.sum(rank() + 1), replica.sum(torch.tensor([1, rank()])).tolist()))

    new_runs(plan)(loop)
    assert sums == [(3, [2, 1])] * 2 if plan.data == 2 else [(1, [1, 0])]


# ---------------------------------------------------------------- the state dict


@each_plan
def test_a_state_dict_has_the_models_names(new_runs: Callable[[Plan], Runs], plan: Plan):
    """In the model's order."""

    def loop() -> None:
        assert list(make_replica(stateful, plan).state_dict()) == list(stateful().state_dict())

    new_runs(plan)(loop)


@each_plan
def test_training_continues_from_a_loaded_state_dict(new_runs: Callable[[Plan], Runs], plan: Plan):
    torch.manual_seed(7)
    state = stateful().state_dict()

    def loop() -> None:
        replica = make_replica(stateful, plan)
        assert not torch.equal(replica.state_dict()["0.weight"], state["0.weight"])
        replica.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in replica.state_dict().items())
        replica.train_step(share(X), share(Y)).result()
        assert not torch.equal(replica.state_dict()["0.weight"], state["0.weight"])

    new_runs(plan)(loop)


@each_plan
def test_a_wrong_state_dict_changes_nothing(new_runs: Callable[[Plan], Runs], plan: Plan):
    def loop() -> None:
        replica = make_replica(stateful, plan)
        before = replica.state_dict()
        missing = {name: torch.zeros_like(value) for name, value in before.items() if name != "5.bias"}
        with pytest.raises(
            CheckpointError, match=r"load_state_dict: the state does not fit the model: 1 missing \(5\.bias\)"
        ):
            replica.load_state_dict(missing)
        with pytest.raises(CheckpointError, match=r"1 extra \(head\)"):
            replica.load_state_dict(before | {"head": torch.ones(1)})
        wrong = {name: torch.zeros_like(value) for name, value in before.items()} | {"5.bias": torch.zeros(4)}
        with pytest.raises(
            CheckpointError, match=r"1 tensors of another shape than the model: 5\.bias \(4,\) for \(3,\)"
        ):
            replica.load_state_dict(wrong)
        assert bits({0: replica.state_dict()}) == bits({0: before})

    new_runs(plan)(loop)


@each_plan
@pytest.mark.parametrize("name", ["weights.pt", "file://weights.safetensors"])
def test_starting_from_a_file_of_weights(new_runs: Callable[[Plan], Runs], plan: Plan, name: str):
    """A resumed run continues from its checkpoint instead."""
    runs = new_runs(plan)
    torch.manual_seed(7)
    in_file = stateful().state_dict()
    path = runs.folder / name.removeprefix("file://")
    save_file(in_file, str(path)) if name.endswith("safetensors") else torch.save(in_file, path)
    weights = f"file://{path}" if name.startswith("file://") else path
    ends: list[dict[str, Tensor]] = []

    def loop() -> None:
        replica = make_replica(stateful, plan, weights=weights)
        start = replica.state_dict()
        if ends:
            assert bits({0: start}) == bits({0: ends[0]})
            return
        assert all(torch.equal(value, in_file[key]) for key, value in start.items())
        replica.train_step(share(X), share(Y))
        report({}, replica)
        if rank() == 0:
            state = replica.state_dict()
        current("the test").gather(None)
        if rank() == 0:
            ends.append(state)

    runs(loop)
    if plan.data == 1:  # with more replicas, each continues from its own buffers
        runs(loop)
    assert len(ends) == 1


def test_weights_of_another_model_are_refused(new_runs: Callable[[Plan], Runs]):
    runs = new_runs(Plan(data=2, pipeline=2))
    torch.save(CNN().state_dict(), runs.folder / "weights.pt")
    with pytest.raises(
        CheckpointError, match=r"weights\.pt' does not fit the model: \d+ missing \(0\.weight, .*\) and 8 extra"
    ):
        runs(lambda: make_replica(stateful, runs.plan, weights=runs.folder / "weights.pt") and None)


# ---------------------------------------------------------------- a loss that is not finite


@each_plan
def test_a_run_resumes_from_before_a_nan_loss(new_runs: Callable[[Plan], Runs], plan: Plan):
    """A loss that becomes NaN saves the last committed step."""
    whole, broken = new_runs(plan), new_runs(plan)
    whole.train()

    def spoil(step: int) -> Callable[[], None]:
        def loop() -> None:
            replica = make_replica(stateful, plan)
            for _ in epochs(EPOCHS):
                for batch in batches("train", batch_size=BATCH):
                    number = current("the test").step + 1
                    x = torch.full_like(batch["x"], float("inf")) if number >= step else batch["x"]
                    replica.train_step(x, batch["y"]).result()

        return loop

    with pytest.raises(
        NonFiniteError, match=r"the loss became nan at step 4: .* The step was not committed."
    ) as caught:
        broken(spoil(4))
    assert caught.value.step == 4
    assert caught.value.checkpoint == newest_checkpoint(broken.storage)
    assert f"The last committed step (3) is saved in {caught.value.checkpoint}" in str(caught.value)
    broken.train()
    assert len(broken.losses) == 3
    assert broken.losses == whole.losses[3:]
    assert bits(broken.states) == bits(whole.states)


def test_the_first_step_too(new_runs: Callable[[Plan], Runs]):
    plan = Plan(data=2, pipeline=2, microbatches=2)
    runs, whole = new_runs(plan), new_runs(plan)
    with pytest.raises(NonFiniteError) as caught:
        runs(lambda: make_replica(stateful, plan).train_step(share(X) * float("nan"), share(Y)).loss and None)
    assert (caught.value.step, Path(str(caught.value.checkpoint)).name) == (1, "checkpoint_00000000")
    runs.train()
    whole.train()
    assert bits(runs.states) == bits(whole.states)


# ---------------------------------------------------------------- what is refused


def test_a_second_model_in_one_loop_is_refused(new_runs: Callable[[Plan], Runs]):
    def loop() -> None:
        make_replica(plain, Plan())
        make_replica(plain, Plan())

    with pytest.raises(UsageError, match="parallelize was called twice in one train loop; needed: one model per run"):
        new_runs(Plan())(loop)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": 3}, ModelError, r"parallelize\(loss_fn=…\): found int, needed a function"),
        ({"optimizer": None}, ModelError, r"parallelize\(optimizer=…\): found NoneType, needed a function"),
        ({"max_grad_norm": 0}, ModelError, r"parallelize\(max_grad_norm=0\): needed a number above 0, or None"),
        ({"max_grad_norm": float("nan")}, ModelError, r"max_grad_norm=nan\): needed a number above 0"),
        ({"split": ["nosuch"]}, SplitError, r"the model has no module 'nosuch'"),
        ({"split": ["2", "4"]}, SplitError, r"makes 3 stages, but the plan has 2"),
        ({"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, ModelError, r"optimizer: found LBFGS"),
        ({"weights": "/nonexistent.pt"}, CheckpointError, r"weights='/nonexistent\.pt': no such file"),
        (
            {"weights": "s3://bucket/w.safetensors?endpoint_override=127.0.0.1:1&scheme=what"},
            CheckpointError,
            r"weights='s3://bucket/w\.safetensors\?endpoint_override=127\.0\.0\.1:1&scheme=what' cannot be reached",
        ),
    ],
)
def test_all_replicas_refuse_alike(
    new_runs: Callable[[Plan], Runs], options: dict[str, Any], error: type[Exception], message: str
):
    plan = Plan(data=2, pipeline=2)
    refused: list[int] = []

    def loop() -> None:
        try:
            make_replica(plain, plan, **options)
        except error:
            refused.append(rank())
            current("the test").gather(None)
            raise

    with pytest.raises(error, match=message):
        new_runs(plan)(loop)
    assert sorted(refused) == [0, 1]


def test_a_model_is_given_as_a_function_that_builds_it(new_runs: Callable[[Plan], Runs]):
    with pytest.raises(ModelError, match=r"parallelize\(build_model=…\): found str, needed a function"):
        new_runs(Plan())(lambda: make_replica("plain", Plan()) and None)  # type: ignore[arg-type]


def test_a_split_makes_no_sense_with_one_stage(new_runs: Callable[[Plan], Runs]):
    with pytest.raises(SplitError, match=r"split=\['2'\] makes 2 stages, but the plan has 1"):
        new_runs(Plan())(lambda: make_replica(plain, Plan(), split=["2"]) and None)


@each_plan
def test_inputs_and_targets_have_equally_many_rows(new_runs: Callable[[Plan], Runs], plan: Plan):
    def loop() -> None:
        make_replica(plain, plan).train_step(X, Y[:1])

    with pytest.raises(DataError, match="found 12 rows of inputs and 1 rows of targets"):
        new_runs(plan)(loop)


@each_plan
def test_an_error_in_the_loss_has_an_address(new_runs: Callable[[Plan], Runs], plan: Plan):
    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        raise IndexError("targets out of range")

    def loop() -> None:
        replica = make_replica(plain, plan, loss_fn=loss_fn)
        for _ in range(3):
            replica.train_step(share(X), share(Y))

    last = len(plan.actor_of_stage) - 1
    with pytest.raises(
        UserCodeError, match=r"replica 0, stage \d, micro-batch 0: forward raised IndexError: targets"
    ) as caught:
        new_runs(plan)(loop)
    assert (caught.value.replica, caught.value.stage) == (0, last)
    assert isinstance(caught.value.__cause__, IndexError)


# ---------------------------------------------------------------- where the model is cut


def holders(new_runs: Callable[[Plan], Runs], plan: Plan, **options: Any) -> Iterator[dict[int, list[str]]]:
    actors: list[ActorInfo] = []

    def loop() -> None:
        replica = make_replica(CNN, plan, **options)
        actors[:] = replica.describe()

    new_runs(plan)(loop)
    assert [(info.replica, info.actor) for info in actors] == [
        (replica, actor) for replica in range(plan.data) for actor in range(plan.pipeline)
    ]
    return (dict(info.stages) for info in actors)


def test_describe_names_each_actors_modules(new_runs: Callable[[Plan], Runs]):
    plan = Plan(data=2, pipeline=2, placement=[0, 1, 0])
    modules = list(holders(new_runs, plan, split=["conv2", "fc2"]))
    assert modules == [{0: ["conv1"], 2: ["fc2"]}, {1: ["conv2", "fc1"]}] * 2


def test_without_names_measured_times_decide_the_split(
    new_runs: Callable[[Plan], Runs], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(local, "measure_units", lambda *_: [4.0, 4.0, 1.0, 1.0])
    modules = list(holders(new_runs, Plan(pipeline=2), split=None, example_inputs=torch.zeros(64, 1, 28, 28)))
    assert modules == [{0: ["conv1"]}, {1: ["conv2", "fc1", "fc2"]}]


def test_one_replica_measures_for_all(new_runs: Callable[[Plan], Runs], monkeypatch: pytest.MonkeyPatch):
    times = iter([[1.0, 1.0, 1.0, 3.0]])
    monkeypatch.setattr(local, "measure_units", lambda *_: next(times))
    plan = Plan(data=2, pipeline=2)
    modules = list(holders(new_runs, plan, split=None, example_inputs=torch.zeros(16, 1, 28, 28)))
    assert modules == [{0: ["conv1", "conv2", "fc1"]}, {1: ["fc2"]}] * 2


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) @ table)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("even_times")
@pytest.mark.parametrize("split", [None, ["b"]])
@pytest.mark.parametrize("arrays", [False, True])
def test_example_inputs_may_be_all_that_a_batch_may_be(
    new_runs: Callable[[Plan], Runs], split: list[str] | None, arrays: bool
):
    """NumPy arrays and raypar.shared inside the inputs fit train_step, but ended in a TypeError here."""
    plan = Plan(pipeline=2)
    inputs: Any = (X, shared(torch.eye(8)))
    if arrays:
        inputs = {"x": X.numpy(), "table": shared(np.eye(8, dtype=np.float32))}
    losses: list[float] = []

    def loop() -> None:
        replica = make_replica(WithTable, plan, split=split, example_inputs=inputs)
        losses.append(replica.train_step(inputs, Y).loss)

    new_runs(plan)(loop)
    assert 0 < losses[0] < 3


def test_an_untraced_argument_is_refused(new_runs: Callable[[Plan], Runs]):
    class WithMask(WithTable):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            hidden = torch.tanh(self.a(x))
            return self.b(hidden if mask is None else hidden * mask)  # type: ignore[no-any-return]

    plan = Plan(pipeline=2)

    def loop() -> None:
        make_replica(WithMask, plan, split=["b"]).train_step((X, torch.ones(12, 8)), Y).loss  # noqa: B018

    with pytest.raises(ModelError, match=r"passes the argument 'mask' .* give parallelize example_inputs"):
        new_runs(plan)(loop)
