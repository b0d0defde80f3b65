"""Programs are played here by a second simulator, written from the rules of the channels alone:

- Messages from one actor to another form one ordered channel. The sender's n-th send meets the receiver's n-th post.
- A send completes when its receive is posted and everything before it in its channel is complete.
- Neither a send nor a post waits; a computation waits for its receives; a release waits for its send.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raypar.errors import ScheduleError
from raypar.planning import program as module
from raypar.planning.program import (
    AHEAD,
    Compute,
    Edge,
    Instruction,
    Message,
    Post,
    Program,
    Release,
    Send,
    check,
    programs,
)
from raypar.planning.schedule import Action, Schedule
from raypar.planning.schedules import forward_only, gpipe, one_forward_one_backward

Maker = Callable[[Sequence[int], int], Schedule]
MAKERS: list[Maker] = [gpipe, one_forward_one_backward, forward_only]

# ---------------------------------------------------------------- what is generated


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, ...]:
    """Up to 8 stages on up to 4 actors, each of which holds one at least."""
    actors = draw(st.integers(1, 4))
    more = draw(st.lists(st.integers(0, actors - 1), max_size=8 - actors))
    return tuple(draw(st.permutations([*range(actors), *more])))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Edge]]:
    """A placement, and the edges of a stage graph: the chain with some links missing, and skips."""
    placement = draw(placements())
    all_edges = list(itertools.combinations(range(len(placement)), 2))
    chain = [edge for edge in all_edges if edge[1] == edge[0] + 1]
    skips = draw(st.lists(st.sampled_from(all_edges), max_size=6)) if all_edges else []
    missing = draw(st.lists(st.sampled_from(chain), max_size=2)) if chain else []
    return placement, sorted({*chain, *skips} - set(missing))


any_graph = graphs()
any_maker = st.sampled_from(MAKERS)
any_microbatches = st.integers(0, 16)

# ---------------------------------------------------------------- the simulator


def channel(message: Message, placement: Sequence[int]) -> tuple[int, int]:
    return placement[message.sender], placement[message.receiver]


def play(all_programs: Sequence[Program], placement: Sequence[int], chance: Random) -> list[tuple[int, Instruction]]:
    """Let a random actor that can go on take one instruction, until none can; returns what ran, in its order."""
    posts: dict[tuple[int, int], list[Message]] = {}
    sends: dict[tuple[int, int], list[Message]] = {}
    place: dict[Message, int] = {}  # of each message that was sent, in its channel
    at = [0] * len(all_programs)
    ran: list[tuple[int, Instruction]] = []

    def complete(message: Message) -> bool:
        return message in place and place[message] < len(posts.get(channel(message, placement), []))

    def can_go_on(actor: int) -> bool:
        if at[actor] == len(all_programs[actor]):
            return False
        instruction = all_programs[actor][at[actor]]
        if isinstance(instruction, Compute):
            return all(map(complete, instruction.needs))
        return not isinstance(instruction, Release) or complete(instruction.message)

    while free := [actor for actor in range(len(at)) if can_go_on(actor)]:
        actor = chance.choice(free)
        instruction = all_programs[actor][at[actor]]
        at[actor] += 1
        ran.append((actor, instruction))
        if isinstance(instruction, Post):
            posts.setdefault(channel(instruction.message, placement), []).append(instruction.message)
        elif isinstance(instruction, Send):
            sent = sends.setdefault(channel(instruction.message, placement), [])
            place[instruction.message] = len(sent)
            sent.append(instruction.message)
    assert sends == posts, "some message met the receive of another one"
    return ran


def receive_buffers(program: Program) -> int:
    """The most messages at once that are posted and not yet used."""
    changes = [
        1 if isinstance(instruction, Post) else -len(instruction.needs) if isinstance(instruction, Compute) else 0
        for instruction in program
    ]
    return max(itertools.accumulate(changes, initial=0))


def live_activations(row: Sequence[Action]) -> int:
    """The most forward passes at once whose backward pass has not run."""
    return max(itertools.accumulate((1 if action.kind == "F" else -1 for action in row), initial=0))


def causes(all_programs: Sequence[Program]) -> dict[tuple[int, int], list[int]]:
    """For each instruction (actor, index), how many instructions of each actor must have run before it can."""
    sent_at = {
        instruction.message: (actor, index)
        for actor, program in enumerate(all_programs)
        for index, instruction in enumerate(program)
        if isinstance(instruction, Send)
    }
    known: dict[tuple[int, int], list[int]] = {}
    at = [0] * len(all_programs)
    while any(at[actor] < len(program) for actor, program in enumerate(all_programs)):
        before = list(at)
        for actor, program in enumerate(all_programs):
            while at[actor] < len(program):
                index, instruction = at[actor], program[at[actor]]
                needs = instruction.needs if isinstance(instruction, Compute) else ()
                if not all(sent_at[message] in known for message in needs):
                    break
                own = list(known[actor, index - 1]) if index else [0] * len(all_programs)
                own[actor] = index
                vectors = [own]
                for sender, position in (sent_at[message] for message in needs):
                    vectors.append(list(known[sender, position]))
                    vectors[-1][sender] = max(vectors[-1][sender], position + 1)
                known[actor, index] = [max(column) for column in zip(*vectors, strict=True)]
                at[actor] += 1
        assert at != before, "the programs wait for each other"
    return known


# ---------------------------------------------------------------- what always holds


@settings(deadline=None)
@given(any_maker, any_graph, any_microbatches, st.randoms(use_true_random=False))
def test_programs_end_in_any_order(
    make: Maker, graph: tuple[tuple[int, ...], list[Edge]], microbatches: int, chance: Random
):
    """Whichever actor advances first, and even if a send waits for its receive."""
    placement, edges = graph
    found = programs(make(placement, microbatches), edges)
    ran = play(found, placement, chance)
    assert [[i for who, i in ran if who == actor] for actor in range(len(found))] == [list(p) for p in found]


@settings(deadline=None)
@given(any_maker, any_graph, any_microbatches, st.randoms(use_true_random=False))
def test_each_action_runs_once_after_its_inputs(
    make: Maker, graph: tuple[tuple[int, ...], list[Edge]], microbatches: int, chance: Random
):
    placement, edges = graph
    ran = play(programs(make(placement, microbatches), edges), placement, chance)
    order = [instruction.action for _, instruction in ran if isinstance(instruction, Compute)]
    kinds = "F" if make is forward_only else "FB"
    wanted = itertools.product(range(len(placement)), kinds, range(microbatches))
    assert Counter(order) == Counter(Action(*each) for each in wanted)
    when = {action: index for index, action in enumerate(order)}
    for source, target in edges:
        for number in range(microbatches):
            assert when[Action(source, "F", number)] < when[Action(target, "F", number)]
            if "B" in kinds:
                assert when[Action(target, "B", number)] < when[Action(source, "B", number)]
    for stage, number in itertools.product(range(len(placement)), range(microbatches)):
        assert "B" not in kinds or when[Action(stage, "F", number)] < when[Action(stage, "B", number)]


@settings(deadline=None)
@given(any_maker, any_graph, any_microbatches)
def test_each_message_is_handled_once(make: Maker, graph: tuple[tuple[int, ...], list[Edge]], microbatches: int):
    """Made, posted, sent, used and released."""
    placement, edges = graph
    crossing = [(s, t) for s, t in edges if placement[s] != placement[t]]
    wanted = {Message(s, "F", number, t) for s, t in crossing for number in range(microbatches)}
    if make is not forward_only:
        wanted |= {Message(t, "B", number, s) for s, t in crossing for number in range(microbatches)}
    for actor, program in enumerate(programs(make(placement, microbatches), edges)):
        index = {(type(i), i[0]): number for number, i in enumerate(program)}
        computed = {i.action: number for number, i in enumerate(program) if isinstance(i, Compute)}
        assert len(index) == len(program), "an instruction occurs twice"
        arriving = {message for message in wanted if placement[message.receiver] == actor}
        leaving = {message for message in wanted if placement[message.sender] == actor}
        assert {i.message for i in program if isinstance(i, Post)} == arriving
        assert Counter(m for i in program if isinstance(i, Compute) for m in i.needs) == Counter(arriving)
        assert {i.message for i in program if isinstance(i, Send)} == leaving
        assert {i.message for i in program if isinstance(i, Release)} == leaving
        for message in arriving:
            used_by = Action(message.receiver, message.kind, message.microbatch)
            assert index[Post, message] < computed[used_by]
            assert message in program[computed[used_by]].needs  # type: ignore[union-attr]
        for message in leaving:
            made_by = Action(message.sender, message.kind, message.microbatch)
            assert computed[made_by] < index[Send, message] < index[Release, message]


@settings(deadline=None)
@given(any_maker, any_graph, any_microbatches)
def test_receives_are_posted_ahead_by_a_fixed_distance(
    make: Maker, graph: tuple[tuple[int, ...], list[Edge]], microbatches: int
):
    """`AHEAD` actions before their use, so that the values of one more than that many actions are all the room they
    take."""
    placement, edges = graph
    for program in programs(make(placement, microbatches), edges):
        needs = [len(i.needs) for i in program if isinstance(i, Compute)]
        assert receive_buffers(program) <= max((sum(needs[i : i + 1 + AHEAD]) for i in range(len(needs))), default=0)
        for index, instruction in enumerate(program):
            if isinstance(instruction, Compute):
                before = [i for i in program[:index] if isinstance(i, Compute)]
                for message in instruction.needs:
                    posted = program.index(Post(message))
                    between = [i for i in program[posted:index] if isinstance(i, Compute)]
                    assert len(between) == min(AHEAD, len(before))


@settings(deadline=None)
@given(any_maker, any_graph)
def test_receive_buffers_are_bounded(make: Maker, graph: tuple[tuple[int, ...], list[Edge]]):
    """They do not grow with the number of micro-batches."""
    placement, edges = graph
    into = Counter(target for _, target in edges) + Counter(source for source, _ in edges)
    bound = (1 + AHEAD) * max(into.values(), default=0)
    for microbatches in (4, 8, 16):
        assert max(check(make(placement, microbatches), edges).receive_buffers) <= bound


@settings(deadline=None)
@given(any_maker, any_graph, any_microbatches)
def test_the_bounds_are_reached(make: Maker, graph: tuple[tuple[int, ...], list[Edge]], microbatches: int):
    placement, edges = graph
    schedule = make(placement, microbatches)
    bounds = check(schedule, edges)
    assert list(bounds.receive_buffers) == [receive_buffers(program) for program in programs(schedule, edges)]
    if make is forward_only:
        assert set(bounds.activations) == {0}  # nothing is kept for a backward pass that does not come
    else:
        assert list(bounds.activations) == [live_activations(row) for row in schedule.rows]


@settings(deadline=None)
@given(placements(), any_microbatches)
def test_activations_kept_under_1f1b(placement: tuple[int, ...], microbatches: int):
    """Stage s of S keeps those of at most S - s micro-batches."""
    schedule = one_forward_one_backward(placement, microbatches)
    bounds = check(schedule, [(stage, stage + 1) for stage in range(len(placement) - 1)])
    for actor, row in enumerate(schedule.rows):
        mine = [stage for stage, holder in enumerate(placement) if holder == actor]
        for stage in mine:
            kept = live_activations([action for action in row if action.stage == stage])
            assert kept <= len(placement) - stage
        assert bounds.activations[actor] <= sum(len(placement) - stage for stage in mine)


@settings(deadline=None)
@given(any_maker, any_graph, any_microbatches)
def test_messages_are_released_after_their_use(
    make: Maker, graph: tuple[tuple[int, ...], list[Edge]], microbatches: int
):
    """In the middle of a program: once the receiver has used them, or many others have followed."""
    placement, edges = graph
    found = programs(make(placement, microbatches), edges)
    before = causes(found)
    computed = {
        instruction.action: (actor, index)
        for actor, program in enumerate(found)
        for index, instruction in enumerate(program)
        if isinstance(instruction, Compute)
    }
    for actor, program in enumerate(found):
        last = max((index for index, i in enumerate(program) if isinstance(i, Compute)), default=0)
        for index, instruction in enumerate(program[:last]):
            if isinstance(instruction, Release):
                _, kind, number, receiver = instruction.message
                user, position = computed[Action(receiver, kind, number)]
                channel = [
                    i.message
                    for i in program[:index]
                    if isinstance(i, Send) and placement[i.message.receiver] == placement[receiver]
                ]
                behind = len(channel) - 1 - channel.index(instruction.message)
                assert before[actor, index][user] > position or behind > len(found)


def test_1f1b_releases_sends_within_the_step():
    def most_kept(program: Program) -> int:
        changes = (isinstance(i, Send) - isinstance(i, Release) for i in program)
        return max(itertools.accumulate(changes))

    for microbatches in (8, 16, 32):
        schedule = one_forward_one_backward((0, 1, 2), microbatches)
        assert [most_kept(program) for program in programs(schedule, [(0, 1), (1, 2)])] == [3, 3, 2]


@pytest.mark.parametrize("make", [gpipe, forward_only])
def test_sends_without_an_answer_are_released(make: Maker):
    edges = [(0, 1), (1, 2), (0, 2)]
    few, many = (check(make((0, 1, 2), microbatches), edges) for microbatches in (16, 64))
    assert few.sent == many.sent
    assert max(many.sent) <= 2 * (3 + 2)


def test_no_send_is_waited_for_if_both_lag():
    """GPipe on [0, 1, 0]: actor 0 takes up what stage 1 sends only after all its passes of stage 0, so that it must
    not wait until actor 1, which waits for it, has taken up those."""
    assert check(gpipe((0, 1, 0), 64), [(0, 1), (1, 2)]).sent == (64, 64)


# ---------------------------------------------------------------- examples


def shown(program: Program) -> str:
    words = []
    for instruction in program:
        if isinstance(instruction, Compute):
            words.append(str(instruction.action))
        else:
            words.append(f"{type(instruction).__name__.lower()}({instruction.message})")
    return " ".join(words)


def test_drawings_of_programs():
    """In the docstring."""
    rows = (("0F0", "0F1", "0B0", "0B1"), ("1F0", "1B0", "1F1", "1B1"))
    schedule = Schedule("drawn", (0, 1), 2, tuple(tuple(map(Action.parse, row)) for row in rows))
    assert module.__doc__ is not None
    upper, lower = module.__doc__.split("programs(schedule, edges)")
    for actor, row in enumerate(rows):
        assert re.findall(rf"actor {actor}: +(.*?)(?:  |\n)", upper) == [" ".join(row)]
    for actor, program in enumerate(programs(schedule, [(0, 1)])):
        (drawn,) = re.findall(rf"actor {actor}: +(.*) …\n", lower)
        assert shown(program).startswith(drawn + " ")


def test_two_stages_as_programs():
    assert list(map(shown, programs(one_forward_one_backward((0, 1), 3), [(0, 1)]))) == [
        "post(1B0▶0) 0F0 send(0F0▶1) post(1B1▶0) 0F1 send(0F1▶1) post(1B2▶0) 0B0 release(0F0▶1) 0F2 send(0F2▶1) "
        "0B1 release(0F1▶1) 0B2 release(0F2▶1)",
        "post(0F0▶1) post(0F1▶1) 1F0 post(0F2▶1) 1B0 send(1B0▶0) 1F1 1B1 send(1B1▶0) 1F2 release(1B0▶0) "
        "1B2 send(1B2▶0) release(1B1▶0) release(1B2▶0)",
    ]


def test_nothing_is_sent_within_an_actor():
    found = programs(gpipe((0, 0), 2), [(0, 1)])
    assert list(map(shown, found)) == ["0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1"]


def test_a_skip_edge_is_one_message():
    """Straight from its source to its target."""
    found = programs(forward_only((0, 1, 2), 1), [(0, 1), (0, 2), (1, 2)])
    assert list(map(shown, found)) == [
        "0F0 send(0F0▶1) send(0F0▶2) release(0F0▶1) release(0F0▶2)",
        "post(0F0▶1) 1F0 send(1F0▶2) release(1F0▶2)",
        "post(0F0▶2) post(1F0▶2) 2F0",
    ]


def test_messages_travel_in_the_order_of_use():
    """The history: actor 0 holds stages 0 and 1 and, under gpipe, runs stage 0 on all micro-batches first; stage 2 uses
    the values of both. A channel once carried messages in the order of their making: all of stage 0's before the first
    of stage 1's, so that actor 1 held as many receive buffers as there are micro-batches."""
    schedule = gpipe((0, 0, 1), 8)
    edges = [(0, 1), (0, 2), (1, 2)]
    sender = programs(schedule, edges)[0]
    sent = [str(i.message) for i in sender if isinstance(i, Send) and i.message.kind == "F"]
    assert sent[:4] == ["0F0▶2", "1F0▶2", "0F1▶2", "1F1▶2"]
    assert check(schedule, edges).receive_buffers == (AHEAD + 1, 2 * (AHEAD + 1))


# ---------------------------------------------------------------- what check refuses


def broken(text: str, placement: tuple[int, ...] = (0, 1), microbatches: int = 1) -> Schedule:
    rows = (tuple(map(Action.parse, row.split())) for row in text.split("|"))
    return Schedule("mine", placement, microbatches, tuple(rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 | 1F0", "has 1B0 0 times, needed once"),
        ("0F0 0F0 0B0 | 1F0 1B0", "has 0F0 2 times, needed once"),
        ("0F0 1B0 | 1F0 0B0", "has 1B0 on actor 0, which does not hold that stage"),
        ("0F0 0B0 | 1F0 1B0 2F0", "has 2F0 on actor 1, which does not hold that stage"),
        ("0F0 0B0 0F1 | 1F0 1B0", "has 0F1, but only 1 micro-batches"),
        ("0B0 0F0 | 1F0 1B0", "deadlocks: actor 0 at 0B0, actor 1 at 1F0 wait for each other"),
        ("0F0 0B0 | 1B0 1F0", "deadlocks: actor 0 at 0B0, actor 1 at 1B0 wait for each other"),
    ],
)
def test_wrong_tables_are_refused(text: str, message: str):
    """Those that repeat, omit or misplace an action, or deadlock."""
    with pytest.raises(ScheduleError, match=f"the schedule 'mine' {re.escape(message)}"):
        check(broken(text), [(0, 1)])


def test_a_deadlock_across_micro_batches_is_refused():
    circular = broken("0F0 0F1 2F0 2F1 2B0 2B1 0B1 0B0 | 1F0 1F1 1B0 1B1", (0, 1, 0), 2)
    assert check(circular, [(0, 1), (1, 2)])  # another order of backward passes is no circle …
    circular = broken("0F0 2F0 0F1 2F1 2B0 2B1 0B0 0B1 | 1F1 1F0 1B0 1B1", (0, 1, 0), 2)
    with pytest.raises(ScheduleError, match="deadlocks: actor 0 at 2F0, actor 1 at 1F1"):
        check(circular, [(0, 1), (1, 2)])  # … but this is


@pytest.mark.parametrize("edge", [(1, 0), (0, 0), (0, 2), (-1, 1)])
def test_an_edge_must_lead_to_a_later_stage(edge: Edge):
    with pytest.raises(ScheduleError, match=re.escape(f"the edge {edge} does not lead from an earlier stage")):
        check(gpipe((0, 1), 2), [edge])


@settings(deadline=None)
@given(any_graph, st.integers(1, 8), st.randoms(use_true_random=False))
def test_one_action_more_or_less_is_refused(
    graph: tuple[tuple[int, ...], list[Edge]], microbatches: int, chance: Random
):
    placement, edges = graph
    assume(len(placement) * microbatches > 1)  # else what is left of 0F0 0B0 is a schedule of forward passes alone
    whole = one_forward_one_backward(placement, microbatches)
    actor = chance.randrange(len(whole.rows))
    row = list(whole.rows[actor])
    index = chance.randrange(len(row))
    for changed in ([*row[:index], *row[index + 1 :]], [*row[:index], row[index], *row[index:]]):
        rows = (*whole.rows[:actor], tuple(changed), *whole.rows[actor + 1 :])
        with pytest.raises(ScheduleError):
            check(Schedule("mine", placement, microbatches, rows), edges)


@settings(deadline=None)
@given(any_graph, st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_other_simulator_agrees(graph: tuple[tuple[int, ...], list[Edge]], microbatches: int, chance: Random):
    """Whatever schedule `check` accepts ends there too."""
    placement, edges = graph
    rows = [list(row) for row in gpipe(placement, microbatches).rows]
    for row in rows:
        one, other = chance.randrange(len(row)), chance.randrange(len(row))
        row[one], row[other] = row[other], row[one]
    schedule = Schedule("mine", placement, microbatches, tuple(map(tuple, rows)))
    try:
        check(schedule, edges)
    except ScheduleError:
        return
    found = programs(schedule, edges)
    assert len(play(found, placement, chance)) == sum(map(len, found))
