"""The timeline of a traced run, as two files in the run's folder: timeline.json and timeline.svg."""

from __future__ import annotations

import json
from collections.abc import Sequence

from raypar.compute.storage import Storage
from raypar.planning.errors import CheckpointError
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.timeline import Event, chrome_trace, gantt, newest_step

TRACE, CHART = "timeline.json", "timeline.svg"


def write_timeline(storage: Storage, plan: Plan, events: Sequence[Event], *, in_turns: bool) -> None:
    """Write both, over those of an earlier attempt; nothing where no step was recorded.

    in_turns: the actors shared one thread, so that none ever computed beside another; the chart says so.

    Raises CheckpointError where the storage cannot be written to.
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
