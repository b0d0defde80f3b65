from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raypar.checkpoint.saver import SaveRequest, save
from raypar.engine.microbatch import shared
from raypar.engine.step import StepRequest, StepResult
from raypar.errors import CheckpointError, DataError, NonFiniteError, UsageError, UserCodeError
from raypar.loop.position import DataPosition, Loop, Position
from raypar.loop.replica import Replica, report
from raypar.loop.session import RunSpec, Session, enter
from raypar.observe.actor_info import ActorInfo
from raypar.observe.bubble import Timing
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage
from support.saved import manifest_of, saved_values

Log = list[str]


class FakeActors:
    """ReplicaActors that write down what they are asked for; `errors` says what the step of a number raises."""

    def __init__(self, log: Log, errors: dict[int, Exception], storage: Storage) -> None:
        self.log, self.errors, self.storage = log, errors, storage
        self.failure: CheckpointError | None = None
        self.requests: list[StepRequest] = []
        self.loaded: dict[str, torch.Tensor] = {}

    def train_step(self, request: StepRequest) -> Callable[[], StepResult]:
        self.log.append(f"start {request.step}")
        self.requests.append(request)

        def wait() -> StepResult:
            self.log.append(f"end {request.step}")
            if request.step in self.errors:
                raise self.errors[request.step]
            return StepResult(request.step, 1.0 / request.step, 2.0, 2 * request.batch.rows, 0.1, skipped=False)

        return wait

    def eval_step(self, request: StepRequest) -> tuple[float, float]:
        self.log.append("evaluate")
        self.requests.append(request)
        return 6.0, float(request.batch.rows)

    def predict(self, request: StepRequest) -> Any:
        self.log.append("predict")
        self.requests.append(request)
        return request.batch.inputs.tree()

    def state_dict(self) -> dict[str, torch.Tensor]:
        self.log.append("model")
        return {"a": torch.ones(1), "b": torch.zeros(2)}

    def save(self, request: SaveRequest) -> None:
        self.log.append(f"save {request.step}")
        try:
            save(self.storage, request, {"model": {"a": torch.ones(1), "b": torch.zeros(2)}})
        except CheckpointError as error:
            self.failure = error

    def wait_until_saved(self, limit_s: float | None = None) -> None:
        self.log.append("saved")
        if self.failure is not None:
            raise self.failure

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.loaded = state

    def names(self) -> dict[str, torch.Size]:
        return {"a": torch.Size([1]), "b": torch.Size([2])}

    def timings(self) -> list[Timing]:
        return [Timing({0: 1.0}, {0: 1.0}, {0: 1}, 2.0)]

    def describe(self) -> list[ActorInfo]:
        return [ActorInfo(0, 0, "cpu", pid=1, cores=1)]


class FakeSession(Session):
    """The session of the first of two replicas, of which the other one does the same."""

    def __init__(self, folder: Path) -> None:
        super().__init__(RunSpec(lambda: None, Plan(data=2), {}, Timeouts(), Storage.open(folder, "run")), 0)
        self.published: list[tuple[dict[str, Any], str | None]] = []

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    def measure(self, spec: Any, units: Any, example_inputs: Any) -> list[float]:
        raise NotImplementedError

    def start_actors(self, spec: Any) -> Any:
        raise NotImplementedError

    def publish(self, metrics: dict[str, Any], path: str | None) -> None:
        self.published.append((metrics, path))

    def show_progress(self, progress: dict[str, Any]) -> None:
        pass


@pytest.fixture
def session(tmp_path: Path) -> FakeSession:
    return FakeSession(tmp_path)


@pytest.fixture
def log() -> Log:
    return []


@pytest.fixture
def errors() -> dict[int, Exception]:
    return {}


@pytest.fixture
def actors(log: Log, errors: dict[int, Exception], session: FakeSession) -> FakeActors:
    return FakeActors(log, errors, session.storage)


@pytest.fixture
def replica(session: FakeSession, actors: FakeActors) -> Replica:
    return Replica(session, actors)


X, Y = torch.zeros(3, 2), torch.zeros(3)

# ---------------------------------------------------------------- steps under way


def test_a_step_is_started_and_not_waited_for(replica: Replica, log: Log):
    output = replica.train_step(X, Y)
    assert log == ["start 1"]
    assert output.step == 1
    assert log == ["start 1"]


def test_two_steps_at_most_are_under_way(replica: Replica, log: Log):
    for _ in range(4):
        replica.train_step(X, Y)
    assert log == ["start 1", "start 2", "end 1", "start 3", "end 2", "start 4"]


def test_reading_an_outcome_waits_once(replica: Replica, log: Log):
    """For the step, and for those before it."""
    replica.train_step(X, Y)
    output = replica.train_step(X, Y)
    assert (output.loss, output.grad_norm, output.samples, output.lr, output.skipped) == (0.5, 2.0, 6, 0.1, False)
    assert log == ["start 1", "start 2", "end 1", "end 2"]


def test_an_older_output_keeps_its_own_result(replica: Replica):
    outputs = [replica.train_step(X, Y) for _ in range(4)]
    assert [output.loss for output in reversed(outputs)] == [1 / 4, 1 / 3, 1 / 2, 1.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda replica: replica.wait(),
        lambda replica: replica.eval_step(X, Y),
        lambda replica: replica.predict(X),
        lambda replica: replica.sum(1),
        lambda replica: replica.state_dict(),
        lambda replica: replica.load_state_dict({"a": torch.ones(1), "b": torch.zeros(2)}),
        lambda replica: replica.bubble(),
    ],
)
def test_other_calls_wait_for_steps_under_way(
    replica: Replica, log: Log, call: Callable[[Replica], Any], errors: dict[int, Exception]
):
    replica.train_step(X, Y)
    replica.train_step(X, Y)
    call(replica)
    assert log[:4] == ["start 1", "start 2", "end 1", "end 2"]
    errors[3] = UserCodeError("mine")
    replica.train_step(X, Y)
    with pytest.raises(UserCodeError, match="mine"):
        call(replica)


def test_the_session_waits_for_the_last_steps(replica: Replica, session: FakeSession, log: Log):
    replica.train_step(X, Y)
    session.wait_for_steps()
    assert log == ["start 1", "end 1"]


def test_an_error_is_raised_at_each_wait(replica: Replica, log: Log, errors: dict[int, Exception]):
    errors[1] = UserCodeError("replica 0, stage 1: forward raised", replica=0, stage=1)
    first, second = replica.train_step(X, Y), replica.train_step(X, Y)
    for call in (lambda: replica.train_step(X, Y), lambda: first.loss, lambda: second.loss, replica.wait):
        with pytest.raises(UserCodeError, match="stage 1: forward raised"):
            call()
    assert log == ["start 1", "start 2", "end 1"]


def test_a_resumed_run_continues_to_count_steps(session: FakeSession, actors: FakeActors):
    session.step = 41
    replica = Replica(session, actors)
    assert [replica.train_step(X, Y).step for _ in range(2)] == [42, 43]


# ---------------------------------------------------------------- what is handed to the actors


def test_a_request_has_rows_and_form(replica: Replica, actors: FakeActors):
    """The form depends on everything but the rows."""
    replica.train_step(X, Y)
    replica.train_step(X[:1], Y[:1])
    replica.train_step(X.double(), Y)
    replica.train_step({"x": X, "mask": shared(torch.ones(9))}, (Y,))
    assert [request.batch.rows for request in actors.requests] == [3, 1, 3, 3]
    assert actors.requests[0].batch.form == actors.requests[1].batch.form
    assert len({request.batch.form for request in actors.requests}) == 3


def test_a_batch_without_rows_is_requested(replica: Replica, actors: FakeActors):
    replica.train_step(X[:0], Y[:0])
    assert actors.requests[0].batch.rows == 0


@pytest.mark.parametrize(
    "call", [lambda replica: replica.train_step(X, Y[:2]), lambda replica: replica.eval_step(X, Y[:2])]
)
def test_inputs_and_targets_of_different_rows_are_refused(replica: Replica, log: Log, call: Callable[[Replica], Any]):
    """Nothing is started."""
    with pytest.raises(DataError, match="found 3 rows of inputs and 2 rows of targets; needed the same number"):
        call(replica)
    assert log == []
    assert replica.train_step(X, Y).step == 1


# ---------------------------------------------------------------- evaluation


def test_an_eval_loss_is_over_all_replicas(replica: Replica):
    output = replica.eval_step(X, Y)
    assert (output.loss, output.samples) == (12.0 / 6.0, 6)


def test_the_loss_over_no_row_is_nan(replica: Replica):
    output = replica.eval_step(X[:0], Y[:0])
    assert output.loss != output.loss
    assert output.samples == 0


def test_a_prediction_needs_no_targets(replica: Replica, actors: FakeActors):
    assert replica.predict(X) is X
    assert actors.requests[0].batch.targets is None


def test_a_sum_keeps_its_type(replica: Replica):
    assert (replica.sum(3), type(replica.sum(3))) == (6, int)
    assert (replica.sum(1.5), type(replica.sum(1.5))) == (3.0, float)
    assert (replica.sum(np.int64(3)), type(replica.sum(np.int64(3)))) == (6, int)
    assert replica.sum(True) == 2
    tensor = torch.tensor([1, 2])
    assert replica.sum(tensor).tolist() == [2, 4]
    assert tensor.tolist() == [1, 2]
    assert replica.sum(torch.tensor([1.0], requires_grad=True)).requires_grad is False


# ---------------------------------------------------------------- weights


def test_a_state_dict_is_loaded_whole(replica: Replica, actors: FakeActors):
    state = replica.state_dict()
    assert list(state) == ["a", "b"]
    replica.load_state_dict(state)
    assert actors.loaded is state


def test_a_state_dict_with_other_names_is_refused(replica: Replica, actors: FakeActors):
    state = {"a": torch.ones(1)} | {f"c{n}": torch.ones(1) for n in range(12)}
    with pytest.raises(
        CheckpointError, match=r"load_state_dict: the state .* 1 missing \(b\) and 12 extra \(c0"
    ) as caught:
        replica.load_state_dict(state)
    assert "c9" in str(caught.value)
    assert "c10" not in str(caught.value)
    assert actors.loaded == {}


def test_a_state_dict_with_other_shapes_is_refused(replica: Replica, actors: FakeActors):
    with pytest.raises(CheckpointError, match=r"1 tensors of another shape than the model: b \(3,\) for \(2,\)"):
        replica.load_state_dict({"a": torch.ones(1), "b": torch.zeros(3)})
    assert actors.loaded == {}


# ---------------------------------------------------------------- reports


@pytest.fixture
def inside(session: FakeSession) -> FakeSession:
    enter(session)
    return session


@pytest.fixture(autouse=True)
def outside() -> Any:
    yield
    enter(None)  # type: ignore[arg-type]


def test_a_report_adds_step_and_epoch(inside: FakeSession, replica: Replica):
    inside.data = DataPosition(Position(3))
    report({"loss": torch.tensor(0.5), "count": np.int64(3), "one": np.ones(1), "note": "x", "each": np.arange(2)})
    row = {"step": 0, "epoch": 3, "loss": 0.5, "count": 3, "one": 1.0, "note": "x", "each": [0, 1]}
    assert inside.published == [(row, None)]
    assert inside.history == [row]
    assert type(row["count"]) is int


def test_a_report_with_a_replica_saves(inside: FakeSession, replica: Replica, log: Log):
    """It waits for the steps under way, and starts to save."""
    replica.train_step(X, Y)
    report({"loss": 0.5}, replica)
    assert log == ["start 1", "end 1", "save 1"]
    assert inside.published == []
    inside.close()
    assert log[-1] == "saved"
    ((row, path),) = inside.published
    assert row == {"step": 1, "epoch": 0, "loss": 0.5}
    manifest = manifest_of(path)
    assert (manifest["step"], manifest["history"], manifest["plan"]["data"]) == (1, [row], 2)
    assert saved_values(path)["model", "a"].tolist() == [1.0]


def test_a_checkpoint_is_published_before_the_next(inside: FakeSession, replica: Replica, log: Log):
    for _ in range(2):
        replica.train_step(X, Y)
        report({}, replica)
    assert log == ["start 1", "end 1", "save 1", "start 2", "end 2", "saved", "save 2"]
    report({})
    assert [row["step"] for row, _ in inside.published] == [1, 2, 2]
    assert [str(path)[-9:] for _, path in inside.published] == ["_00000001", "_00000002", "None"]


def test_a_failed_checkpoint_is_raised_at_the_next_report(inside: FakeSession, replica: Replica, actors: FakeActors):
    """It is told once, and the run continues."""
    folder = Path(inside.storage.path)
    replica.train_step(X, Y)
    folder.write_text("a file where a folder is needed")
    report({"loss": 0.5}, replica)
    folder.unlink()
    replica.train_step(X, Y)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 could not be written to .* a writable"):
        report({"loss": 0.25}, replica)
    inside.close()
    assert [row["loss"] for row, _ in inside.published] == [0.5, 0.25]
    assert [path is None for _, path in inside.published] == [True, False]


def test_a_run_whose_last_checkpoint_cannot_be_written_fails(inside: FakeSession, replica: Replica):
    Path(inside.storage.path).write_text("a file where a folder is needed")
    report({}, replica)
    with pytest.raises(CheckpointError, match="the checkpoint of step 0 could not be written"):
        inside.close()


def test_a_failed_loop_completes_its_checkpoint(inside: FakeSession, replica: Replica, log: Log):
    report({}, replica)
    inside.saving.abandon()
    assert log == ["save 0", "saved"]
    assert inside.published == []


def test_a_report_without_a_replica_waits_too(inside: FakeSession, replica: Replica, log: Log):
    """History: its row had the number of the last step that had been waited for: 3 after five steps."""
    replica.train_step(X, Y)
    replica.train_step(X, Y)
    report({})
    assert inside.published == [({"step": 2, "epoch": 0}, None)]
    assert log == ["start 1", "start 2", "end 1", "end 2"]


def test_a_metric_may_be_called_epoch(inside: FakeSession):
    report({"epoch": 7})
    assert inside.history == [{"step": 0, "epoch": 7}]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (0.5, r"raypar\.report\(0\.5\): needed a dict of metrics by name"),
        ({"model": object()}, r"raypar\.report: the metric 'model' is a object, needed a number"),
        ({"when": np.datetime64("2026-01-01")}, r"the metric 'when' is a date, needed a number"),
    ],
)
def test_other_metrics_are_refused(inside: FakeSession, metrics: Any, message: str):
    with pytest.raises(UsageError, match=message):
        report(metrics)
    assert inside.history == []


# ---------------------------------------------------------------- a loss that is not finite


@pytest.mark.parametrize("at_once", [False, True])
def test_a_non_finite_loss_names_the_checkpoint(
    session: FakeSession,
    actors: FakeActors,
    errors: dict[int, Exception],
    at_once: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """That of the last committed step, which it saves. ReplicaActors in this process have ended a step when
    `train_step` returns, and raise its error there."""
    errors[3] = NonFiniteError("the loss became nan at step 3.", step=3, stage=1)
    if at_once:
        later = actors.train_step
        monkeypatch.setattr(actors, "train_step", lambda request: (lambda result: lambda: result)(later(request)()))
    replica = Replica(session, actors)

    loop = Loop("train", 9, {"batch_size": 3})
    session.data.begin_loop(loop)

    def steps(first: int, last: int) -> None:
        for number in range(first, last + 1):
            session.data.next_batch(loop, number - 1)
            replica.train_step(X, Y)

    steps(1, 2)
    with pytest.raises(
        NonFiniteError, match=r"at step 3\. The last committed step \(2\) is saved in .*_00000002"
    ) as caught:
        steps(3, 5)
    assert (caught.value.step, caught.value.stage) == (3, 1)
    manifest = manifest_of(caught.value.checkpoint)
    assert (manifest["step"], manifest["position"]) == (
        2,
        {"epoch": 0, "trained": {"train": 2}, "batching": {"train": {"batch_size": 3}}},
    )
    assert len(list(Path(session.storage.path).iterdir())) == 1


def test_a_non_finite_first_step_saves_its_epoch(session: FakeSession, replica: Replica, errors: dict[int, Exception]):
    """A resumed run tries that epoch again."""
    errors[3] = NonFiniteError("the loss became nan at step 3.", step=3, stage=None)
    for _ in session.data.epochs_to_do(2):
        loop = Loop("train", 2, {"batch_size": 3})
        session.data.begin_loop(loop)
        for index in range(2):
            session.data.next_batch(loop, index)
            replica.train_step(X, Y)
        session.data.end_loop(loop)
    with pytest.raises(NonFiniteError) as caught:
        replica.wait()
    manifest = manifest_of(caught.value.checkpoint)
    assert (manifest["step"], manifest["position"]) == (2, {"epoch": 1, "trained": {}, "batching": {}})


def test_a_non_finite_loss_without_a_checkpoint(session: FakeSession, replica: Replica, errors: dict[int, Exception]):
    """It is raised also if nothing can be saved."""
    Path(session.storage.path).write_text("a file where a folder is needed")
    errors[1] = NonFiniteError("the loss became nan at step 1.", step=1, stage=None)
    output = replica.train_step(X, Y)
    with pytest.raises(
        NonFiniteError, match=r"nan at step 1\. Also, the checkpoint of step 0 could not be written"
    ) as caught:
        output.result()
    assert caught.value.checkpoint is None
