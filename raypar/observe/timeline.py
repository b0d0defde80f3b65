"""What each actor did when: as a trace for Perfetto or chrome://tracing, and as a Gantt chart.

replica 0, actor 0  │0F0│0F1│…wait…│0B0│0F2│        measured: one step, one box per action
replica 0, actor 1      │1F0│1B0   │1F1│
ideal     actor 0   │0F0│0F1│     │0B0│0F2│         the schedule itself, with the mean times of the actions
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from raypar.errors import CheckpointError
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.schedule import Action, Schedule, start_times
from raypar.storage import Storage

COLOURS = {
    "F": "#4c8bf5", "B": "#2e9e5b", "I": "#57b894", "W": "#f2a93b",
    "wait": "#e8e8e8", "send": "#b69adf", "reduce": "#d9534f", "gather": "#e8a33d", "commit": "#8a6d5c",
}  # fmt: skip
NAMES = {
    "F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights",
    "wait": "waits for a message", "send": "starts a send", "reduce": "adds up gradients",
    "gather": "gathers weights", "commit": "commit",
}  # fmt: skip

LEFT, WIDTH, ROW, GAP = 150, 1200, 26, 6


class Event(NamedTuple):
    """One thing that one actor did in one step.

    kind:       "F", "B", "I", "W" as in a schedule; "wait", "send", "reduce", "gather" or "commit".
    microbatch: -1 if it belongs to none.
    start, end: seconds since 1970 by the clock of the actor's machine; the clocks of two machines differ (by about a
                millisecond under NTP).
    """

    replica: int
    actor: int
    step: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float

    @property
    def is_compute(self) -> bool:
        return self.kind in ("F", "B", "I", "W")

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}" if self.is_compute else NAMES[self.kind]


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """The events in the format of chrome://tracing, which Perfetto opens: replicas as processes, actors as threads."""
    origin = min((event.start for event in events), default=0.0)
    trace: list[dict[str, Any]] = []
    for replica, actor in sorted({(event.replica, event.actor) for event in events}):
        for kind, name in (("process_name", f"replica {replica}"), ("thread_name", f"actor {actor}")):
            trace.append({"ph": "M", "name": kind, "pid": replica, "tid": actor, "args": {"name": name}})
    for event in events:
        arguments = {"step": event.step, "stage": event.stage}
        if event.microbatch >= 0:
            arguments["micro-batch"] = event.microbatch
        trace.append(
            {
                "ph": "X",
                "name": str(event),
                "cat": event.kind,
                "pid": event.replica,
                "tid": event.actor,
                "ts": (event.start - origin) * 1e6,
                "dur": (event.end - event.start) * 1e6,
                "args": arguments,
            }
        )
    return {"traceEvents": trace, "displayTimeUnit": "ms"}


def newest_step(events: Sequence[Event]) -> int | None:
    """The last step that all actors have recorded up to its commit; if there is none, the last one that all of them
    have started, or None."""
    actors = {(event.replica, event.actor) for event in events}
    for chosen in ([event for event in events if event.kind == "commit"], events):
        steps = [{e.step for e in chosen if (e.replica, e.actor) == actor} for actor in actors]
        shared = set.intersection(*steps) if steps else set()
        if shared:
            return max(shared)
    return None


def gantt(events: Sequence[Event], schedule: Schedule, title: str) -> str:
    """The newest step as an SVG chart: one row per actor, and below them the schedule's ideal, in which each action
    takes the mean of its measured times and messages take no time."""
    actors = sorted({(event.replica, event.actor) for event in events})
    step = newest_step(events)
    if step is None:
        return _svg([], [], title, 0.0, "no step was recorded")
    shown = [event for event in events if event.step == step]
    origin = min(event.start for event in shown)
    rows = [
        (
            f"replica {replica}, actor {actor}",
            [(e, e.start - origin, e.end - origin) for e in shown if (e.replica, e.actor) == (replica, actor)],
        )
        for replica, actor in actors
    ]
    ideal = _ideal(shown, schedule)
    length = max(end for _, boxes in [*rows, *ideal] for _, _, end in boxes)
    return _svg(rows, ideal, f"{title}, step {step}", length, _bubbles(rows, ideal))


Row = tuple[str, list[tuple[Event, float, float]]]


def _ideal(shown: Sequence[Event], schedule: Schedule) -> list[Row]:
    times: dict[tuple[int, str], list[float]] = {}
    for event in shown:
        times.setdefault((event.stage, event.kind), []).append(event.end - event.start)

    def duration(action: Action) -> float:
        measured = times.get((action.stage, action.kind), [0.0])
        return sum(measured) / len(measured)

    starts = start_times(schedule, duration)
    return [
        (
            f"ideal, actor {actor}",
            [
                (
                    Event(0, actor, 0, action.kind, action.stage, action.microbatch, 0.0, 0.0),
                    starts[action],
                    starts[action] + duration(action),
                )
                for action in row
            ],
        )
        for actor, row in enumerate(schedule.rows)
    ]


def _bubbles(rows: Sequence[Row], ideal: Sequence[Row]) -> str:
    return f"idle between first and last pass: {_idle(rows):.0%} measured, {_idle(ideal):.0%} ideal"


def _idle(rows: Sequence[Row]) -> float:
    """The share of all actors' time, from the first to the last pass of any of them, in which they do not compute."""
    passes = [(start, end) for _, boxes in rows for event, start, end in boxes if event.is_compute]
    if not passes:
        return 0.0
    length = max(end for _, end in passes) - min(start for start, _ in passes)
    return 1.0 - sum(end - start for start, end in passes) / (length * len(rows)) if length else 0.0


def _svg(rows: Sequence[Row], ideal: Sequence[Row], title: str, length: float, note: str) -> str:
    scale = WIDTH / length if length else 0.0
    lines: list[str] = []
    y = 64
    for group in (rows, ideal):
        for name, boxes in group:
            lines.append(f'<text x="{LEFT - 8}" y="{y + ROW * 0.68:.0f}" text-anchor="end">{escape(name)}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}" fill="#fafafa"/>')
            lines += [_box(event, LEFT + start * scale, (end - start) * scale, y) for event, start, end in boxes]
            y += ROW + GAP
        y += 2 * GAP
    lines += _axis(length, scale, y)
    y += 40
    x = float(LEFT)
    for kind, colour in COLOURS.items():
        if any(event.kind == kind for _, boxes in rows for event, _, _ in boxes):
            lines.append(f'<rect x="{x:.0f}" y="{y}" width="14" height="14" fill="{colour}"/>')
            lines.append(f'<text x="{x + 20:.0f}" y="{y + 12}">{escape(NAMES[kind])}</text>')
            x += 40 + 7.2 * len(NAMES[kind])
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}" height="{y + 34}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT}" y="46" fill="#555">{escape(note)}</text>',
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"


def _box(event: Event, x: float, width: float, y: float) -> str:
    """A pass fills its row; everything else is a thin line at the bottom of the row, so that bubbles stay visible."""
    top, height = (y + 2, ROW - 4) if event.is_compute else (y + ROW - 7, 5)
    words = f"{event}, micro-batch {event.microbatch}" if event.kind == "wait" else str(event)
    box = (
        f'<rect x="{x:.2f}" y="{top}" width="{max(width, 0.4):.2f}" height="{height}" fill="{COLOURS[event.kind]}">'
        f"<title>{escape(words)}</title></rect>"
    )
    label = str(event)
    if event.is_compute and width > 7 * len(label):
        middle = f'x="{x + width / 2:.2f}" y="{y + ROW * 0.67:.0f}"'
        box += f'<text {middle} text-anchor="middle" font-size="11" fill="white">{label}</text>'
    elif event.is_compute and width > 7 * len(str(event.microbatch)):
        middle = f'x="{x + width / 2:.2f}" y="{y + ROW * 0.67:.0f}"'
        box += f'<text {middle} text-anchor="middle" font-size="10" fill="white">{event.microbatch}</text>'
    return box


def _axis(length: float, scale: float, y: int) -> list[str]:
    """A line with about ten ticks at round numbers of milliseconds."""
    if not length:
        return []
    apart = next(step for power in range(-4, 9) for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
                 if length * 1e3 / step <= 12)  # fmt: skip
    lines = [f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + WIDTH}" y2="{y}" stroke="#888"/>']
    for number in range(int(length * 1e3 / apart) + 1):
        x = LEFT + number * apart / 1e3 * scale
        lines.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#888"/>')
        lines.append(f'<text x="{x:.1f}" y="{y + 19}" text-anchor="middle" fill="#555">{number * apart:g} ms</text>')
    return lines


TRACE, CHART = "timeline.json", "timeline.svg"


def write_timeline(storage: Storage, plan: Plan, events: Sequence[Event], *, in_turns: bool) -> None:
    """Write trace and chart, replacing those of an earlier attempt; nothing if no step was recorded.

    in_turns: the actors shared one thread, so that no two computed at the same time; the chart says so.

    Raises CheckpointError if the storage cannot be written to.
    """
    if not events:
        return
    step = newest_step(events)
    count = len({event.microbatch for event in events if event.step == step and event.is_compute})
    title = f"Plan(data={plan.data}, pipeline={plan.pipeline}, microbatches={count}, schedule={plan.schedule_name!r})"
    if in_turns:
        title += ", local mode: the actors take turns"
    files = {
        TRACE: json.dumps(chrome_trace(events)),
        CHART: gantt(events, schedule_of(plan, count), title),
    }
    try:
        storage.filesystem.create_dir(storage.path, recursive=True)
        for name, text in files.items():
            with storage.filesystem.open_output_stream(f"{storage.path}/{name}") as stream:
                stream.write(text.encode())
    except OSError as error:
        raise CheckpointError(f"the timeline could not be written to {storage.path}: {error}") from error
