from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raypar.checkpoint.manifest import newest_checkpoint, read_manifest
from raypar.errors import UsageError
from raypar.loop import session as module
from raypar.loop.batches import batches
from raypar.loop.local import run_local
from raypar.loop.parallelize import parallelize
from raypar.loop.position import Position
from raypar.loop.replica import Replica, report
from raypar.loop.session import Rate, RunSpec, current, epochs
from raypar.planning.plan import Plan, Timeouts
from raypar.storage import Storage

EPOCHS, ROWS, BATCH = 3, 7, 2
STEPS_AN_EPOCH = 4


class Crash(Exception):
    """What ends a loop in the midst of a run."""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a loop in local mode, from the newest checkpoint of earlier ones; returns the history."""
    for name, first in (("train", 0), ("test", 100)):
        pq.write_table(pa.table({"row": pa.array(range(first, first + ROWS))}), tmp_path / f"{name}.parquet")
    datasets = {name: tmp_path / f"{name}.parquet" for name in ("train", "test")}

    def start(loop: Callable[[], None], plan: Plan | None = None, **options: Any) -> list[dict[str, Any]]:
        return run_local(RunSpec(loop, plan or Plan(), datasets, Timeouts(), Storage.open(tmp_path, "run")), **options)

    return start


def make_replica() -> Replica:
    return parallelize(
        lambda: nn.Linear(1, 1),
        loss_fn=F.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.001),
    )


def train_on(replica: Replica, batch: dict[str, torch.Tensor]) -> None:
    x = batch["row"].float().unsqueeze(1)
    replica.train_step(x, x)


def saved_position(tmp_path: Path) -> dict[str, Any]:
    storage = Storage.open(tmp_path, "run")
    path = newest_checkpoint(storage)
    assert path is not None
    position: dict[str, Any] = read_manifest(path, storage.filesystem)["position"]
    assert position["batching"].keys() == position["trained"].keys()
    return {"epoch": position["epoch"], "trained": position["trained"]}


# ---------------------------------------------------------------- epochs and batches after a resume


def trained_rows(run: Any, crash_after: int | None, inside: bool = True) -> list[tuple[int, list[int]]]:
    """The epoch and the rows of each step of a loop that saves after step `crash_after`, and then crashes."""
    steps: list[tuple[int, list[int]]] = []

    def loop() -> None:
        replica = make_replica()
        for epoch in epochs(EPOCHS):
            for batch in batches("train", batch_size=BATCH):
                train_on(replica, batch)
                steps.append((epoch, batch["row"].tolist()))
                if inside and len(steps) == crash_after:
                    report({}, replica)
                    raise Crash
            if not inside and len(steps) == crash_after:
                report({}, replica)
                raise Crash

    if crash_after is None:
        run(loop)
    else:
        with pytest.raises(Crash):
            run(loop)
    return steps


def test_a_resume_after_an_epoch_starts_the_next(run: Any, tmp_path: Path):
    """Saving every few steps hits the last batch sooner or later. The resumed run then entered that epoch with no
    batch left, and a loop that reports its last step's loss after its batches had none."""
    trained_rows(run, STEPS_AN_EPOCH)
    assert saved_position(tmp_path) == {"epoch": 1, "trained": {}}
    assert {epoch for epoch, _ in trained_rows(run, None)} == set(range(1, EPOCHS))


def test_a_fresh_run_has_all_batches(run: Any):
    steps = trained_rows(run, None)
    assert [epoch for epoch, _ in steps] == [0] * STEPS_AN_EPOCH + [1] * STEPS_AN_EPOCH + [2] * STEPS_AN_EPOCH
    for epoch in range(EPOCHS):
        assert sorted(row for at, rows in steps if at == epoch for row in rows) == list(range(ROWS))


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS_AN_EPOCH + 1))
def test_a_crashed_run_resumes_at_the_next_batch(run: Any, step: int):
    before = trained_rows(run, step)
    assert len(before) == step
    after = trained_rows(run, None)
    assert len(before + after) == EPOCHS * STEPS_AN_EPOCH
    assert len({(epoch, tuple(rows)) for epoch, rows in before + after}) == EPOCHS * STEPS_AN_EPOCH
    for epoch in range(EPOCHS):
        assert sorted(row for at, rows in before + after if at == epoch for row in rows) == list(range(ROWS))


@pytest.mark.parametrize("step", [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH])
def test_a_checkpoint_after_an_epoch_starts_the_next(run: Any, tmp_path: Path, step: int):
    trained_rows(run, step, inside=False)
    assert saved_position(tmp_path) == {"epoch": step // STEPS_AN_EPOCH, "trained": {}}
    assert trained_rows(run, None)[0][0] == step // STEPS_AN_EPOCH


def test_a_checkpoint_counts_trained_batches(run: Any, tmp_path: Path):
    trained_rows(run, STEPS_AN_EPOCH + 3)
    assert saved_position(tmp_path) == {"epoch": 1, "trained": {"train": 3}}


def test_a_run_that_is_over_has_no_epoch_left(run: Any):
    def loop() -> None:
        replica = make_replica()
        for _ in epochs(2):
            for batch in batches("train", batch_size=BATCH):
                train_on(replica, batch)
            report({}, replica)

    def see() -> None:
        assert list(epochs(2)) == []
        assert list(epochs(4)) == [2, 3]

    run(loop)
    run(see)


# ---------------------------------------------------------------- loops that do not train


def seen_by_loops(run: Any, crash_at: tuple[int, int] | None) -> dict[str, list[int]]:
    """How many batches each loop of an epoch got, by its name; `crash_at` is the epoch and the batch to save after."""
    counts: dict[str, list[int]] = {"before": [], "inside": [], "after": [], "again": []}

    def count(kind: str, name: str) -> None:
        counts[kind].append(len(list(batches(name, batch_size=BATCH, shuffle=False))))

    def loop() -> None:
        replica = make_replica()
        for epoch in epochs(2):
            count("before", "test")
            for index, batch in enumerate(batches("train", batch_size=BATCH)):
                count("inside", "test")
                train_on(replica, batch)
                if (epoch, index) == crash_at:
                    report({}, replica)
                    raise Crash
            count("after", "test")
            count("again", "train")

    if crash_at is None:
        run(loop)
    else:
        with pytest.raises(Crash):
            run(loop)
    return counts


def test_a_loop_that_does_not_train_always_gets_all_batches(run: Any):
    """Also one over the rows that were trained on before, in the same epoch: only the first loop after a resume skips
    what training has used. History: every loop skipped it, so this one got nothing."""
    counts = seen_by_loops(run, None)
    assert counts == {"before": [4, 4], "inside": [4] * 8, "after": [4, 4], "again": [4, 4]}


def test_after_a_resume_too(run: Any):
    assert seen_by_loops(run, (0, 1)) == {"before": [4], "inside": [4, 4], "after": [], "again": []}
    assert seen_by_loops(run, None) == {"before": [4, 4], "inside": [4] * 6, "after": [4, 4], "again": [4, 4]}


def test_a_step_after_an_inner_loop_counts_outside(run: Any, tmp_path: Path):
    seen_by_loops(run, (1, 2))
    assert saved_position(tmp_path) == {"epoch": 1, "trained": {"train": 3}}


def test_an_inner_loop_does_not_end_the_outer(run: Any, tmp_path: Path):
    def loop() -> None:
        replica = make_replica()
        for _ in epochs(1):
            for number, batch in enumerate(batches("train", batch_size=BATCH)):
                train_on(replica, batch)
                assert len(list(batches("train", batch_size=BATCH))) == STEPS_AN_EPOCH
                report({}, replica)
                assert saved_position(tmp_path)["epoch"] == int(number == STEPS_AN_EPOCH - 1)
            report({}, replica)
            assert saved_position(tmp_path)["epoch"] == 1

    run(loop)


@pytest.mark.parametrize(("saved_after", "left"), [(2, 2), (4, 0)])
def test_without_epochs_each_loop_gets_all_batches(run: Any, saved_after: int, left: int):
    """All but the first loop after a resume."""
    counts: list[int] = []

    def loop() -> None:
        replica = make_replica()
        for _ in range(3):
            steps = 0
            for batch in batches("train", batch_size=BATCH):
                train_on(replica, batch)
                steps += 1
                if len(counts) == 1 and steps == saved_after:
                    report({}, replica)
            counts.append(steps)

    with pytest.warns(UserWarning, match="outside raypar.epochs"):
        run(loop)
    with pytest.warns(UserWarning, match="outside raypar.epochs"):
        run(loop)
    assert counts == [4, 4, 4, left, 4, 4]


def test_once_training_resumes_nothing_is_skipped(run: Any):
    seen_by_loops(run, (0, 1))
    counts: list[int] = []

    def loop() -> None:
        replica = make_replica()
        for batch in batches("train", batch_size=BATCH):
            train_on(replica, batch)
            counts.append(len(list(batches("train", batch_size=BATCH))))

    run(loop)
    assert counts == [4, 4]


def test_the_next_epoch_skips_nothing(run: Any):
    seen_by_loops(run, (0, 1))

    def loop() -> None:
        counts = [len(list(batches("train", batch_size=BATCH))) if epoch else None for epoch in epochs(2)]
        assert counts == [None, 4]

    run(loop)


def test_a_loop_that_is_left_early_ends_there(run: Any, tmp_path: Path):
    def loop() -> None:
        replica = make_replica()
        for _ in epochs(2):
            for batch in batches("train", batch_size=BATCH):
                train_on(replica, batch)
                break
            report({}, replica)

    assert [(row["step"], row["epoch"]) for row in run(loop)] == [(1, 0), (2, 1)]
    assert saved_position(tmp_path) == {"epoch": 2, "trained": {}}


def test_steps_outside_loops_leave_the_position(run: Any, tmp_path: Path):
    def loop() -> None:
        replica = make_replica()
        for _ in epochs(1):
            assert len(list(batches("test", batch_size=BATCH))) == 4
            train_on(replica, {"row": torch.ones(3)})
            report({}, replica)

    run(loop)
    assert saved_position(tmp_path) == {"epoch": 0, "trained": {}}


# ---------------------------------------------------------------- several loops at once, other arguments


def crash_and_go_on(run: Any, body: Callable[[Replica, list[Any], bool], None]) -> tuple[list[Any], list[Any]]:
    """What `body` has seen in a run that crashed, and in the one that went on from it."""
    seen: tuple[list[Any], list[Any]] = ([], [])
    with pytest.raises(Crash):
        run(lambda: body(make_replica(), seen[0], True))
    run(lambda: body(make_replica(), seen[1], False))
    return seen


def test_a_step_counts_for_both_loops(run: Any, tmp_path: Path):
    """Only the data set whose batch came last was counted: a resumed run paired the first batch of one with the third
    of the other."""

    def body(replica: Replica, seen: list[Any], crash: bool) -> None:
        for _ in epochs(1):
            pairs = zip(*(batches(name, batch_size=BATCH, shuffle=False) for name in ("train", "test")), strict=True)
            for one, other in pairs:
                train_on(replica, one)
                seen.append((one["row"][0].item(), other["row"][0].item()))
                report({}, replica)
                if crash and len(seen) == 2:
                    assert saved_position(tmp_path) == {"epoch": 0, "trained": {"train": 2, "test": 2}}
                    raise Crash

    assert crash_and_go_on(run, body) == ([(0, 100), (2, 102)], [(4, 104), (6, 106)])
    assert saved_position(tmp_path) == {"epoch": 1, "trained": {}}


def test_an_unfinished_loop_does_not_hold_up_the_epoch(run: Any, tmp_path: Path):
    """A first batch fetched by hand, to look at it, leaves a loop open for as long as its iterator lives."""

    def loop() -> None:
        replica = make_replica()
        for _ in epochs(1):
            iterator = batches("train", batch_size=BATCH)
            next(iterator)
            for number, batch in enumerate(batches("train", batch_size=BATCH)):
                train_on(replica, batch)
                report({}, replica)
                if number == 1:
                    assert saved_position(tmp_path) == {"epoch": 0, "trained": {"train": 2}}
            report({}, replica)
            assert saved_position(tmp_path) == {"epoch": 1, "trained": {}}
            next(iterator)

    run(loop)


@pytest.mark.parametrize("changed", [{"batch_size": 3}, {"seed": 1}, {"shuffle": False}, {"window": 2}])
def test_an_epoch_is_not_resumed_with_other_batches(run: Any, changed: dict[str, Any]):
    """Behind two batches of 2 rows, with batch_size=3, the resumed run went on at row 6: two rows were never seen."""

    def body(replica: Replica, seen: list[Any], crash: bool) -> None:
        for _ in epochs(1):
            for batch in batches("train", **{"batch_size": BATCH} | ({} if crash else changed)):
                train_on(replica, batch)
                seen.append(batch)
                report({}, replica)
                if crash and len(seen) == 2:
                    raise Crash

    with pytest.raises(
        UsageError,
        match=r"resumes after batch 2 of an epoch with batch_size=2, shuffle=True, seed=0, window=7, rows=7, "
        r"row_groups=1; found batch_size=",
    ):
        crash_and_go_on(run, body)


def test_the_next_epoch_may_have_other_batches(run: Any):
    def body(replica: Replica, seen: list[Any], crash: bool) -> None:
        for _ in epochs(2):
            for batch in batches("train", batch_size=BATCH if crash else 3, seed=int(crash)):
                train_on(replica, batch)
                seen.append(len(batch["row"]))
            report({}, replica)
            if crash:
                raise Crash

    assert crash_and_go_on(run, body) == ([2, 2, 2, 1], [3, 3, 1])


def test_evaluating_first_uses_up_nothing(run: Any):
    """Of what the training loop skips after a resume: it did, and the resumed run trained on the batches of the epoch
    a second time."""

    def body(replica: Replica, seen: list[Any], crash: bool) -> None:
        for _ in epochs(1):
            list(batches("train", batch_size=BATCH, shuffle=False))
            for batch in batches("train", batch_size=BATCH, shuffle=False):
                train_on(replica, batch)
                seen.append(batch["row"][0].item())
                report({}, replica)
                if crash and len(seen) == 2:
                    raise Crash

    assert crash_and_go_on(run, body) == ([0, 2], [4, 6])


def test_a_second_pass_outside_epochs_warns(run: Any):
    """The warning comes once: the pass has the order of the first. With `for epoch in range(5)` all epochs have the
    same order of rows, and nothing said so."""

    def loop(**options: Any) -> Callable[[], None]:
        def train() -> None:
            replica = make_replica()
            for _ in range(4):
                list(batches("test", batch_size=BATCH))
                for batch in batches("train", batch_size=BATCH, **options):
                    train_on(replica, batch)

        return train

    with pytest.warns(
        UserWarning, match=r"second pass over raypar\.batches\('train'\) outside raypar\.epochs"
    ) as warned:
        run(loop(), Plan(data=2))
    assert [Path(warning.filename).name for warning in warned] == [Path(__file__).name]
    run(loop(shuffle=False))  # a warning would be an error here


# ---------------------------------------------------------------- the history


def test_the_history_continues_after_a_resume(run: Any):
    def loop(crash: bool) -> Callable[[], None]:
        def train() -> None:
            replica = make_replica()
            for epoch in epochs(2):
                for batch in batches("train", batch_size=BATCH):
                    train_on(replica, batch)
                report({"accuracy": 0.5}, replica)
                if crash:
                    report({"accuracy": 9.0})  # without a checkpoint: lost with the crash
                    raise Crash
                assert epoch == 1

        return train

    with pytest.raises(Crash):
        run(loop(True))
    assert run(loop(False)) == [
        {"step": 4, "epoch": 0, "accuracy": 0.5},
        {"step": 8, "epoch": 1, "accuracy": 0.5},
    ]


# ---------------------------------------------------------------- small things


@pytest.mark.parametrize("count", [-1, 2.0, "3", None])
def test_a_number_of_epochs_is_whole_and_not_negative(run: Any, count: Any):
    with pytest.raises(UsageError, match=r"raypar\.epochs\(.*\): needed a whole number of epochs, 0 or more"):
        run(lambda: epochs(count) and None)


def test_no_epochs_are_fine(run: Any):
    assert run(lambda: list(epochs(0)) and None) == []


@pytest.mark.parametrize("call", [lambda: epochs(1), lambda: report({}), lambda: make_replica()])
def test_outside_a_train_loop_nothing_can_be_called(call: Callable[[], Any]):
    with pytest.raises(
        UsageError, match=r"raypar\.\w+ was called outside a train loop; needed: a call from the function"
    ):
        call()


def test_after_a_run_its_session_is_gone(run: Any):
    run(lambda: None)
    with pytest.raises(UsageError):
        current("report")


def test_a_copy_of_a_position_does_not_move_with_it():
    position = Position(1, {"train": 2})
    copy = position.copy()
    position.trained["train"] = 3
    assert copy == Position(1, {"train": 2})


# ---------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until its `now` is set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_rate_is_since_it_was_last_shown(clock: SimpleNamespace):
    rate = Rate()
    shown = []
    for now, samples in [(0.1, 10), (0.2, 10), (0.5, 30), (0.6, 10), (1.5, 90)]:
        clock.now = now
        shown.append(rate.per_second if rate.count(samples) else None)
    assert shown == [None, None, pytest.approx(100.0), None, pytest.approx(100.0)]


def test_progress_says_position_and_speed(run: Any, clock: SimpleNamespace):
    shown: list[dict[str, Any]] = []

    def loop() -> None:
        replica = make_replica()
        for _ in epochs(2):
            for batch in batches("train", batch_size=BATCH):
                clock.now += 0.5
                train_on(replica, batch)
                list(batches("test", batch_size=1))
                replica.wait()

    run(loop, Plan(data=2), on_progress=shown.append)
    assert [(p["epoch"], p["epochs"], p["step"], p["done"], p["total"]) for p in shown] == [
        (0, 2, 1, 1, 4), (0, 2, 2, 2, 4), (0, 2, 3, 3, 4), (0, 2, 4, 4, 4),
        (1, 2, 5, 1, 4), (1, 2, 6, 2, 4), (1, 2, 7, 3, 4), (1, 2, 8, 4, 4),
    ]  # fmt: skip
    assert all(one["loss"] != other["loss"] for one, other in pairwise(shown))
    assert all(p["samples_per_s"] > 0 for p in shown)
