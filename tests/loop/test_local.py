from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raypar.checkpoint.manifest import list_checkpoints
from raypar.errors import ModelError, NonFiniteError, UsageError
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.replica import Replica, report
from raypar.loop.session import RunSpec, current
from raypar.loop.turns import Turns
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage

NOWHERE = Storage.open("/dev/null", "run")  # nothing can be written there


class Wrong(Exception):
    """What a user's loop raises."""


def run(loop: Callable[[], Any], replicas: int = 2, storage: Storage = NOWHERE, **options: Any) -> list[dict[str, Any]]:
    return run_local(RunSpec(loop, Plan(data=replicas), {}, Timeouts(), storage), **options)


def rank() -> int:
    return current("the test").replica


def gather(value: Any) -> list[Any]:
    return current("the test").gather(value)


def add(value: float) -> float:
    return float(current("the test").sum(torch.tensor(value, dtype=torch.float32)))


def make_replica() -> Replica:
    return parallelize(
        lambda: nn.Linear(1, 1),
        loss_fn=F.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    )


X = torch.ones(2, 1)


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "frozen", "refused"), [("0", False, False), ("head", False, True), ("head", True, False)]
)
def test_an_optimizer_that_selects_nothing_is_refused(name: str, frozen: bool, refused: bool):
    """One that selects nothing on any actor, where there is something to train. A misspelt name in `optimizer=`
    trained nothing, without a word."""

    def loop() -> None:
        parallelize(
            lambda: three_layers().requires_grad_(not frozen),
            loss_fn=F.mse_loss,
            optimizer=lambda module: torch.optim.SGD([p for n, p in module.named_parameters() if n.startswith(name)]),
            split=["1", "2"],
        )

    plan = Plan(pipeline=3, microbatches=2)
    if refused:
        with pytest.raises(ModelError, match="optimizer: found one without any parameter on every actor"):
            run_local(RunSpec(loop, plan, {}, Timeouts(), NOWHERE))
    else:
        run_local(RunSpec(loop, plan, {}, Timeouts(), NOWHERE))


# ---------------------------------------------------------------- one replica at a time


def test_replicas_run_until_they_need_others():
    """Then the next one runs."""
    log: list[str] = []

    def loop() -> None:
        for number in range(3):
            log.append(f"{rank()}: before {number}")
            gather(None)
            log.append(f"{rank()}: after {number}")

    run(loop, replicas=3)
    assert log == [
        "0: before 0", "1: before 0", "2: before 0",
        "2: after 0", "2: before 1", "0: after 0", "0: before 1", "1: after 0", "1: before 1",
        "1: after 1", "1: before 2", "2: after 1", "2: before 2", "0: after 1", "0: before 2",
        "0: after 2", "1: after 2", "2: after 2",
    ]  # fmt: skip


def test_the_order_of_turns_is_the_same_each_time():
    def turns() -> list[int]:
        log: list[int] = []

        def loop() -> None:
            replica = make_replica()
            for _ in range(4):
                log.append(rank())
                replica.train_step(X, X)
            log.append(rank())
            replica.sum(1)
            log.append(rank())

        run(loop, replicas=3)
        return log

    assert turns() == turns()


def test_a_single_replica_runs_in_the_calling_thread():
    """So that a debugger stops in it."""
    threads: list[threading.Thread] = []
    run(lambda: threads.append(threading.current_thread()), replicas=1)
    assert threads == [threading.current_thread()]


def test_values_come_in_replica_order():
    """What is gathered or summed, on all replicas."""
    values: dict[int, tuple[list[Any], float]] = {}

    def loop() -> None:
        values[rank()] = gather(f"of {rank()}"), add([1e8, 1.0, -1e8][rank()])

    run(loop, replicas=3)
    in_order = float((torch.tensor(1e8) + torch.tensor(1.0)) + torch.tensor(-1e8))
    assert values == dict.fromkeys(range(3), (["of 0", "of 1", "of 2"], in_order))


def test_each_replica_gets_its_own_sum():
    sums: dict[int, float] = {}

    def loop() -> None:
        total = current("the test").sum(torch.ones(1))
        total += rank()
        gather(None)
        sums[rank()] = float(total)

    run(loop)
    assert sums == {0: 2.0, 1: 3.0}


# ---------------------------------------------------------------- random numbers


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_each_replica_has_its_own_random_numbers():
    """They are the same in each run."""

    def numbers(switching: bool) -> dict[int, list[tuple[float, float, float]]]:
        numbers_of: dict[int, list[tuple[float, float, float]]] = {0: [], 1: [], 2: []}

        def loop() -> None:
            for _ in range(4):
                numbers_of[rank()].append(draw())
                if switching:
                    gather(None)

        run(loop, replicas=3)
        return numbers_of

    alone, taking_turns = numbers(switching=False), numbers(switching=True)
    assert alone == taking_turns
    assert len({value for of_replica in alone.values() for values in of_replica for value in values}) == 3 * 4 * 3


@pytest.mark.parametrize("plan", [Plan(), Plan(data=2), Plan(pipeline=2), Plan(data=2, pipeline=2)])
def test_training_leaves_the_loops_random_numbers_alone(plan: Plan):
    numbers: dict[tuple[int, bool], list[Any]] = {}

    def loop(train: bool) -> Callable[[], None]:
        def go() -> None:
            drawn = [draw()]
            if train:
                replica = parallelize(
                    lambda: nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)),
                    loss_fn=F.mse_loss,
                    optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
                    example_inputs=X,
                )
                drawn.append(draw())
                replica.train_step(X, X)
                replica.predict(X)
            else:
                drawn.append(draw())
            drawn.append(draw())
            numbers[rank(), train] = drawn

        return go

    for train in (False, True):
        run_local(RunSpec(loop(train), plan, {}, Timeouts(), NOWHERE))
    for number in range(plan.data):
        assert numbers[number, True] == numbers[number, False]


def test_a_run_leaves_the_processs_random_numbers_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    run(lambda: draw() and None)
    with pytest.raises(Wrong):
        run(fail_on(0))
    assert draw() == expected


# ---------------------------------------------------------------- failures


def fail_on(failing: int, log: list[str] | None = None) -> Callable[[], None]:
    def loop() -> None:
        try:
            gather(None)
            if rank() == failing:
                raise Wrong(f"in replica {failing}")
            gather(None)
            raise AssertionError("went on without the replica that failed")
        finally:
            if log is not None:
                log.append(f"{rank()} ended")

    return loop


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_loop_ends_all(failing: int):
    """It is the one that is raised."""
    log: list[str] = []
    with pytest.raises(Wrong, match=f"in replica {failing}"):
        run(fail_on(failing, log), replicas=3)
    assert sorted(log) == ["0 ended", "1 ended", "2 ended"]


def test_an_error_before_the_other_replicas_began_ends_the_run():
    began: list[int] = []

    def loop() -> None:
        began.append(rank())
        raise Wrong

    with pytest.raises(Wrong):
        run(loop, replicas=3)
    assert began == [0]


def test_an_error_of_the_last_step_is_raised(tmp_path: Path):
    """Though nothing has read its outcome."""

    def loop() -> None:
        make_replica().train_step(torch.full((2, 1), float("nan")), X)

    for replicas in (1, 2):
        with pytest.raises(NonFiniteError, match="the loss became nan at step 1"):
            run(loop, replicas, Storage.open(tmp_path, f"run{replicas}"))


def test_a_loop_may_exit():
    for replicas in (1, 2):
        with pytest.raises(SystemExit):
            run(lambda: exit(3), replicas)


def end_of(calls: dict[int, list[str]]) -> Callable[[], None]:
    """A loop in which each replica makes its own calls."""

    def loop() -> None:
        replica = make_replica()
        for call in calls[rank()]:
            if call == "step":
                replica.train_step(X, X)
            elif call == "eval":
                replica.eval_step(X, X)
            elif call == "report":
                report({}, replica)

    return loop


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ({0: ["step", "step"], 1: ["step"]}, "replica 0 waits for all replicas, but the loop of replica 1 has ended"),
        ({0: ["step"], 1: ["step", "step"]}, "replica 1 waits for all replicas, but the loop of replica 0 has ended"),
        ({0: ["eval"], 1: []}, "replica 0 waits for all replicas, but the loop of replica 1 has ended"),
        ({0: [], 1: ["report"]}, "replica 1 waits for all replicas, but the loop of replica 0 has ended"),
        ({0: ["step", "step"], 1: ["step", "eval"]}, "replica 0 called train_step while replica 1 called eval_step or"),
        ({0: ["eval"], 1: ["report"]}, "replica 0 called eval_step or sum while replica 1 called report"),
    ],
)  # fmt: skip
def test_replicas_must_make_the_same_calls(calls: dict[int, list[str]], message: str):
    """Else there is an error, and no wait for ever."""
    with pytest.raises(UsageError, match=message) as caught:
        run(end_of(calls))
    assert "all replicas must call train_step, eval_step, sum and report in the same order" in str(caught.value)


def test_with_three_replicas_too():
    with pytest.raises(UsageError, match="but the loop of replica 1 has ended"):
        run(end_of({0: ["step"], 1: [], 2: ["step"]}), replicas=3)


def test_an_error_of_a_meeting_is_raised_in_all():
    turns = Turns(2)
    errors: dict[int, Exception] = {}

    def act(values: list[int]) -> list[int]:
        raise Wrong(f"with {values}")

    def meet(number: int) -> None:
        turns.wait_for_turn(number)
        try:
            turns.meet(number, "act", number * 10, act)
        except Wrong as error:
            errors[number] = error
        turns.end(number)

    threads = [threading.Thread(target=meet, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: str(error) for number, error in errors.items()} == {0: "with [0, 10]", 1: "with [0, 10]"}


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_threads_of_all_replicas():
    threads: dict[int, threading.Thread] = {}
    main = threading.main_thread().ident
    assert main is not None

    def loop() -> None:
        threads[rank()] = threading.current_thread()
        gather(None)
        if rank() == 1:
            signal.pthread_kill(main, signal.SIGINT)
        while True:
            gather(None)

    with pytest.raises(KeyboardInterrupt):
        run(loop)
    assert sorted(threads) == [0, 1]
    assert not any(thread.is_alive() for thread in threads.values())


def test_no_thread_is_left_after_a_run():
    before = threading.active_count()
    run(lambda: gather(None) and None, replicas=4)
    assert threading.active_count() == before


# ---------------------------------------------------------------- history and checkpoints


def test_the_history_is_that_of_the_first_replica():
    def loop() -> None:
        for number in range(2):
            report({"of": rank(), "number": number})

    assert [(row["of"], row["number"]) for row in run(loop)] == [(0, 0), (0, 1)]


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int | None, left: list[int]):
    storage = Storage.open(tmp_path, "run")

    def loop() -> None:
        replica = make_replica()
        for _ in range(4):
            replica.train_step(X, X)
            report({}, replica)

    run(loop, storage=storage, keep=keep)
    assert [int(Path(path).name.removeprefix("checkpoint_")) for path in list_checkpoints(storage)] == left


def test_a_run_resumes_from_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """It says so."""
    storage = Storage.open(tmp_path, "run")
    steps: list[int] = []
    said: list[str] = []

    def loop() -> None:
        replica = make_replica()
        for _ in range(2):
            steps.append(replica.train_step(X, X).step)
            report({}, replica)

    run(loop, 1, storage, say=said.append)
    first, second = list_checkpoints(storage)
    content = Path(second, "__0_0.distcp").read_bytes()
    Path(second, "__0_0.distcp").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    run(loop, 1, storage, keep=1, say=said.append)
    assert steps == [1, 2, 2, 3]
    assert said == [f"Resuming from {first}"]
    assert f"{second}/__0_0.distcp is damaged" in caplog.text
    assert [Path(path).name for path in list_checkpoints(storage)] == ["checkpoint_00000003"]
