from __future__ import annotations

import re
import textwrap

import pytest

from raypar.errors import ScheduleError
from raypar.planning import schedule as module
from raypar.planning.schedule import Action, Schedule, dependencies, draw, most_activations, start_times
from raypar.planning.schedules import forward_only, gpipe, one_forward_one_backward


def table(text: str) -> str:
    return textwrap.dedent(text).strip()


def parsed(*rows: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(map(Action.parse, row.split())) for row in rows)


# ---------------------------------------------------------------- the notation


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(2, "F", 0), "2F0"),
        (Action(0, "B", 3), "0B3"),
        (Action(11, "B", 128), "11B128"),
        (Action(2, "I", 0), "2I0"),
        (Action(2, "W", 0), "2W0"),
    ],
)
def test_an_action_prints_as_a_word_and_parses_back(action: Action, text: str):
    assert str(action) == text
    assert Action.parse(text) == action
    assert Action.parse(f" {text}\n") == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2f0", "2 F 0", "-1F0", "2F0 2F1", "2F0.5"])
def test_anything_else_is_no_action(text: str):
    with pytest.raises(ScheduleError, match=re.escape(f"found the action {text!r}; needed stage, kind (F, B, I or W)")):
        Action.parse(text)


# ---------------------------------------------------------------- the drawing


def test_the_drawing_in_the_docstring():
    assert module.__doc__ is not None
    drawn = module.__doc__.split("\n\n")[-1]
    assert table(drawn) == draw(one_forward_one_backward((0, 1), 3))


def test_cells_widen_with_the_numbers_of_micro_batches():
    lines = draw(forward_only((0,), 11)).splitlines()
    assert lines[1].endswith("0F8   0F9   0F10")
    assert lines[0].index("10") == lines[1].index("0F10")


def test_a_deadlock_cannot_be_drawn():
    rows = ((Action(0, "F", 0), Action(0, "B", 0)), (Action(1, "B", 0), Action(1, "F", 0)))
    circular = Schedule("mine", (0, 1), 1, rows)
    with pytest.raises(ScheduleError, match="'mine' deadlocks: actor 0 at 0B0, actor 1 at 1B0 wait for each other"):
        draw(circular)


# ---------------------------------------------------------------- order and time


def test_dependencies_of_whole_passes():
    """A forward pass waits for that of the previous stage; a backward pass for its own forward pass and for the next
    stage."""
    assert dependencies(Action(0, "F", 5), stages=3) == []
    assert dependencies(Action(2, "F", 5), stages=3) == [Action(1, "F", 5)]
    assert dependencies(Action(2, "B", 5), stages=3) == [Action(2, "F", 5)]
    assert dependencies(Action(1, "B", 5), stages=3) == [Action(1, "F", 5), Action(2, "B", 5)]


def test_dependencies_of_split_backward_passes():
    """I waits for what a whole backward pass waits for, and W waits for I."""
    split = {(1, 5), (2, 5)}
    assert dependencies(Action(2, "I", 5), 3, split) == [Action(2, "F", 5)]
    assert dependencies(Action(1, "I", 5), 3, split) == [Action(1, "F", 5), Action(2, "I", 5)]
    assert dependencies(Action(1, "W", 5), 3, split) == [Action(1, "I", 5)]


def test_a_backward_pass_waits_only_for_i():
    """If the next stage's backward pass is split."""
    assert dependencies(Action(0, "B", 5), 2, {(1, 5)}) == [Action(0, "F", 5), Action(1, "I", 5)]
    assert dependencies(Action(0, "I", 5), 2, {(0, 5)}) == [Action(0, "F", 5), Action(1, "B", 5)]
    assert dependencies(Action(0, "B", 6), 2, {(1, 5)}) == [Action(0, "F", 6), Action(1, "B", 6)]


def test_two_part_backward_passes():
    mixed = Schedule("mixed", (0, 1), 2, parsed("0F0 0F1 0B0 0B1", "1F0 1I0 1W0 1F1 1B1"))
    assert mixed.two_part == {(1, 0)}
    assert start_times(mixed, lambda action: 1.0)[Action(0, "B", 0)] == 3  # one tick before 1W0 ends
    assert gpipe((0, 1), 2).two_part == frozenset()


def test_actions_start_as_early_as_possible():
    starts = start_times(gpipe((0, 1), 2), lambda action: 2.0 if action.kind == "B" else 1.0)
    assert {str(action): start for action, start in starts.items()} == {
        "0F0": 0, "0F1": 1, "1F0": 1, "1F1": 2, "1B0": 3, "1B1": 5, "0B0": 5, "0B1": 7,
    }  # fmt: skip


# ---------------------------------------------------------------- memory


def test_how_long_activations_are_kept():
    """From the forward pass to the end of the backward pass."""
    assert most_activations(gpipe((0, 1), 4)) == [4, 4]
    split = Schedule("mine", (0, 1), 3, parsed("0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1I0 1F1 1I1 1F2 1W0 1I2 1W1 1W2"))
    assert most_activations(split) == [2, 3]


def test_forward_passes_alone_keep_nothing():
    assert most_activations(forward_only((0, 1), 4)) == [0, 0]
