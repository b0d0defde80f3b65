"""What each actor did when: recorded by the engines, written as a Chrome trace and as an SVG chart."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.nn.functional as F
from torch import nn

import raypar
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.schedules import one_forward_one_backward
from raypar.planning.timeline import Event, chrome_trace, gantt

SVG = "{http://www.w3.org/2000/svg}"
STEPS = 3


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))


def loop() -> None:
    replica = raypar.parallelize(
        build,
        loss_fn=F.mse_loss,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        split=["2", "4", "5"],
    )
    for _ in range(STEPS):
        replica.train_step(torch.ones(8, 8), torch.zeros(8, 8))


def run(folder: Path, plan: Plan, **options: Any) -> Path:
    config = ray.train.RunConfig(name="traced", storage_path=str(folder))
    raypar.Trainer(loop, plan=plan, run_config=config, local=True, **options).fit()
    return folder / "traced"


V = Plan(data=2, pipeline=2, placement=(0, 1, 1, 0), schedule="zbv", microbatches=4)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("timeline"), V, trace=True)


def test_each_action_of_each_step_is_in_the_trace_once_and_no_two_of_an_actor_overlap(traced: Path):
    trace = json.loads((traced / "timeline.json").read_text())["traceEvents"]
    passes = [event for event in trace if event["ph"] == "X" and event["cat"] in "FBIW"]
    needed = Counter(str(action) for row in schedule_of(V).rows for action in row)
    for replica in range(2):
        for step in range(1, STEPS + 1):
            mine = [e["name"] for e in passes if e["pid"] == replica and e["args"]["step"] == step]
            assert Counter(mine) == needed
    for thread in {(event["pid"], event["tid"]) for event in passes}:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in passes if (e["pid"], e["tid"]) == thread)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_what_an_actor_does_besides_computing_is_in_the_trace_too(traced: Path):
    trace = json.loads((traced / "timeline.json").read_text())["traceEvents"]
    assert {event["cat"] for event in trace if event["ph"] == "X"} >= {"wait", "send", "reduce", "commit"}
    names = {(e["name"], e["args"]["name"]) for e in trace if e["ph"] == "M"}
    assert names == {
        (w, f"{k} {n}") for w, k in [("process_name", "replica"), ("thread_name", "actor")] for n in (0, 1)
    }


def test_the_chart_has_a_row_an_actor_a_box_an_action_and_the_ideal_under_it(traced: Path):
    chart = ET.parse(traced / "timeline.svg").getroot()
    words = [text.text or "" for text in chart.iter(f"{SVG}text")]
    rows = [f"replica {replica}, actor {actor}" for replica in (0, 1) for actor in (0, 1)]
    assert [word for word in words if "actor " in word and "," in word and "Plan" not in word] == [
        *rows, "ideal, actor 0", "ideal, actor 1",
    ]  # fmt: skip
    titles = Counter(title.text for title in chart.iter(f"{SVG}title"))
    for row in schedule_of(V).rows:
        for action in row:
            assert titles[str(action)] == 2 + 1  # of each replica, and in the ideal
    assert any("local mode: the actors take turns, step 3" in word for word in words)


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path):
    assert not list(run(tmp_path, Plan(pipeline=4, microbatches=2)).glob("timeline*"))


def test_trace_is_a_yes_or_a_no():
    with pytest.raises(raypar.errors.ConfigError, match=r"Trainer\(trace=1\): needed True or False"):
        raypar.Trainer(loop, plan=Plan(), trace=1)  # type: ignore[arg-type]


def test_the_ideal_is_the_schedule_with_the_mean_times_of_the_actions():
    schedule = one_forward_one_backward((0, 1), 2)
    slow = [Event(0, a.stage, 1, *(a.kind, a.stage, a.microbatch), 10.0 + n, 11.0 + n)
            for row in schedule.rows for n, a in enumerate(row)]  # fmt: skip
    assert "0% ideal" not in gantt(slow, schedule, "title")
    assert "33% ideal" in gantt(slow, schedule, "title")  # 2 of 6 ticks


def test_a_run_without_a_step_has_an_empty_chart():
    assert "no step was recorded" in gantt([], one_forward_one_backward((0, 1), 2), "title")
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}
