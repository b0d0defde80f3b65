"""A position in the data, tried without a run: what a loop does, and what a checkpoint would hold."""

from __future__ import annotations

import pytest

from raypar.errors import UsageError
from raypar.loop.position import DataPosition, Loop, Position

BATCHING = {"batch_size": 2, "shuffle": True, "seed": 0}


def loop_of(name: str = "train", count: int | None = 3) -> Loop:
    return Loop(name, count, dict(BATCHING))


def train(data: DataPosition, loop: Loop, batches: range) -> None:
    for index in batches:
        data.next_batch(loop, index)
        data.trained_on_batch()


def test_a_step_counts_the_newest_batch():
    data, loop = DataPosition(), loop_of()
    data.begin_loop(loop)
    train(data, loop, range(2))
    assert data.position == Position(0, {"train": 2}, {"train": BATCHING})


def test_a_step_counts_every_loop_around_it():
    data, outer, inner = DataPosition(), loop_of("train"), loop_of("other")
    for loop in (outer, inner):
        data.begin_loop(loop)
        data.next_batch(loop, 0)
    data.next_batch(inner, 1)
    assert data.trained_on_batch().trained == {"train": 1, "other": 2}
    assert data.innermost is inner


def test_the_last_batch_is_known_before_its_step():
    data, loop = DataPosition(), loop_of(count=2)
    assert data.is_last_batch() is None
    data.begin_loop(loop)
    seen = []
    for index in range(2):
        data.next_batch(loop, index)
        seen.append(data.is_last_batch())
        data.trained_on_batch()
    assert seen == [False, True]


def test_a_resumed_loop_skips_what_was_trained():
    data = DataPosition(Position(1, {"train": 2}, {"train": BATCHING}))
    assert data.begin_loop(loop_of()) == 2
    assert data.begin_loop(loop_of("test")) == 0


def test_a_resumed_loop_needs_the_same_batches():
    data = DataPosition(Position(1, {"train": 2}, {"train": {**BATCHING, "batch_size": 4}}))
    with pytest.raises(UsageError, match="resumes after batch 2 of an epoch with batch_size=4"):
        data.begin_loop(loop_of())


def test_batches_are_skipped_until_a_step_trains():
    data = DataPosition(Position(0, {"train": 1}, {"train": BATCHING}))
    evaluation, training = loop_of(), loop_of()
    assert data.begin_loop(evaluation) == 1
    data.end_loop(evaluation)
    assert data.begin_loop(training) == 1
    train(data, training, range(1, 2))
    assert data.begin_loop(loop_of()) == 0


def test_a_checkpoint_between_batches_resumes_the_epoch():
    data, loop = DataPosition(), loop_of()
    epochs = data.epochs_to_do(2)
    assert next(epochs) == 0
    data.begin_loop(loop)
    train(data, loop, range(2))
    assert data.to_save() == Position(0, {"train": 2}, {"train": BATCHING})
    train(data, loop, range(2, 3))
    assert data.to_save() == Position(1)


def test_a_checkpoint_after_the_loop_starts_the_next_epoch():
    data, loop = DataPosition(), loop_of()
    next(data.epochs_to_do(2))
    data.begin_loop(loop)
    train(data, loop, range(1))
    data.end_loop(loop)  # left early
    assert data.to_save() == Position(1)


def test_what_is_returned_does_not_move_on():
    data, loop = DataPosition(), loop_of()
    data.begin_loop(loop)
    data.next_batch(loop, 0)
    position = data.trained_on_batch()
    train(data, loop, range(1, 2))
    assert position.trained == {"train": 1}


def test_epochs_continue_where_the_position_is():
    data = DataPosition(Position(1))
    assert list(data.epochs_to_do(3)) == [1, 2]
    assert data.position == Position(3)
    assert data.epochs is None


def test_a_second_pass_outside_epochs_is_told_once():
    data = DataPosition()
    told = []
    for _ in range(3):
        loop = loop_of()
        data.begin_loop(loop)
        train(data, loop, range(3))
        told.append(data.finish_loop(loop))
        data.end_loop(loop)
    assert told == [False, True, False]


def test_a_set_that_cannot_resume_within_an_epoch_repeats_it():
    data = DataPosition(Position(0, {"train": 2}, {"train": BATCHING}))
    assert data.forget_progress("train") == 2
    assert data.begin_loop(loop_of()) == 0
