"""What each actor did when: recorded by the engines, written as a Chrome trace and as an SVG chart."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.nn.functional as F
from torch import nn

import raypar
from raypar.observe.timeline import Event, chrome_trace, gantt
from raypar.planning.plan import Plan, schedule_of
from raypar.planning.schedules import one_forward_one_backward

SVG = "{http://www.w3.org/2000/svg}"
STEPS = 3


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))


def make(loss_fn: Callable[..., Any] = F.mse_loss) -> raypar.Replica:
    return raypar.parallelize(
        build,
        loss_fn=loss_fn,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        split=["2", "4", "5"],
    )


def loop() -> None:
    replica = make()
    for _ in range(STEPS):
        replica.train_step(torch.ones(8, 8), torch.zeros(8, 8))


def run(folder: Path, plan: Plan, loop: Callable[[], None] = loop, **options: Any) -> Path:
    config = ray.train.RunConfig(name="traced", storage_path=str(folder))
    raypar.Trainer(loop, plan=plan, run_config=config, local=True, **options).fit()
    return folder / "traced"


V = Plan(data=2, pipeline=2, placement=(0, 1, 1, 0), schedule="zbv", microbatches=4)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("timeline"), V, trace=True)


def test_each_action_is_traced_once(traced: Path):
    """No two of one actor overlap."""
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


def test_other_work_is_traced_too(traced: Path):
    """Besides computing."""
    trace = json.loads((traced / "timeline.json").read_text())["traceEvents"]
    assert {event["cat"] for event in trace if event["ph"] == "X"} >= {"wait", "send", "reduce", "commit"}
    names = {(e["name"], e["args"]["name"]) for e in trace if e["ph"] == "M"}
    assert names == {
        (w, f"{k} {n}") for w, k in [("process_name", "replica"), ("thread_name", "actor")] for n in (0, 1)
    }


def test_the_chart(traced: Path):
    """One row per actor, one box per action, and the ideal below."""
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


@pytest.mark.parametrize(
    "plan", [V, Plan(pipeline=4, microbatches=4), Plan(data=2, pipeline=4, microbatches=2)], ids=["zbv", "1f1b", "two"]
)
@pytest.mark.parametrize("how", ["user code", "not finite", "Ctrl-C"])
def test_a_failed_run_leaves_a_timeline(tmp_path: Path, plan: Plan, how: str):
    """That is when one wants it most, and there was none."""

    def failing() -> None:
        replica = make()
        for step in range(STEPS):
            value = float("nan") if how == "not finite" and step == STEPS - 1 else 1.0
            replica.train_step(torch.full((8, 8), value), torch.zeros(8, 8))
        replica.wait()
        raise {"user code": KeyError("mine"), "Ctrl-C": KeyboardInterrupt()}[how]

    error = {"user code": KeyError, "not finite": raypar.errors.NonFiniteError, "Ctrl-C": KeyboardInterrupt}[how]
    with pytest.raises(error):
        run(tmp_path, plan, failing, trace=True)
    trace = json.loads((tmp_path / "traced" / "timeline.json").read_text())["traceEvents"]
    found = Counter(e["args"]["step"] for e in trace if e["ph"] == "X" and e["cat"] in "FBIW")
    actions = plan.data * sum(map(len, schedule_of(plan).rows))
    assert found == dict.fromkeys(range(1, STEPS + 1), actions)
    assert f"step {STEPS}" in (tmp_path / "traced" / "timeline.svg").read_text()


def test_evaluation_is_no_part_of_a_step(tmp_path: Path):
    """Its messages were drawn into the last step, which the chart then stretched to the end of the evaluation."""

    def loop_that_evaluates() -> None:
        replica = make()
        for _ in range(STEPS):
            replica.train_step(torch.ones(8, 8), torch.zeros(8, 8))
            replica.eval_step(torch.ones(8, 8), torch.zeros(8, 8))
            replica.predict(torch.ones(8, 8))

    plan = Plan(pipeline=4, microbatches=4)
    kinds = []
    for name, each in (("plain", loop), ("evaluates", loop_that_evaluates)):
        trace = json.loads((run(tmp_path / name, plan, each, trace=True) / "timeline.json").read_text())["traceEvents"]
        kinds.append(Counter((e["cat"], e["args"]["step"]) for e in trace if e["ph"] == "X"))
    assert kinds[0] == kinds[1]


def test_the_chart_shows_the_last_whole_step(tmp_path: Path):
    """A step that was interrupted is in the trace only."""

    def failing() -> None:
        calls = itertools.count()

        def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if next(calls) == 6:
                raise ValueError("in step 2, micro-batch 2")
            return F.mse_loss(output, targets)

        replica = make(loss_fn)
        for _ in range(STEPS):
            replica.train_step(torch.ones(8, 8), torch.zeros(8, 8))

    with pytest.raises(raypar.errors.UserCodeError, match="in step 2, micro-batch 2"):
        run(tmp_path, Plan(pipeline=4, microbatches=4), failing, trace=True)
    trace = json.loads((tmp_path / "traced" / "timeline.json").read_text())["traceEvents"]
    names = {e["name"] for e in trace if e["ph"] == "X" and e["args"]["step"] == 2}
    assert {"3F0", "3F1", "2F2"} <= names
    assert "3F2" not in names
    assert "step 1" in (tmp_path / "traced" / "timeline.svg").read_text()


def test_a_failed_timeline_hides_no_error(tmp_path: Path):
    """If the timeline of a failed run cannot be written, the run's own error is raised."""

    def failing() -> None:
        make().train_step(torch.ones(8, 8), torch.zeros(8, 8))
        (tmp_path / "traced" / "timeline.json").mkdir(parents=True)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(tmp_path, V, failing, trace=True)


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path):
    assert not list(run(tmp_path, Plan(pipeline=4, microbatches=2)).glob("timeline*"))


def test_trace_is_a_yes_or_a_no():
    with pytest.raises(raypar.errors.ConfigError, match=r"Trainer\(trace=1\): needed True or False"):
        raypar.Trainer(loop, plan=Plan(), trace=1)  # type: ignore[arg-type]


def test_the_ideal_has_the_mean_times():
    schedule = one_forward_one_backward((0, 1), 2)
    slow = [Event(0, a.stage, 1, *(a.kind, a.stage, a.microbatch), 10.0 + n, 11.0 + n)
            for row in schedule.rows for n, a in enumerate(row)]  # fmt: skip
    assert "0% ideal" not in gantt(slow, schedule, "title")
    assert "33% ideal" in gantt(slow, schedule, "title")  # 2 of 6 ticks


def test_a_run_without_a_step_has_an_empty_chart():
    assert "no step was recorded" in gantt([], one_forward_one_backward((0, 1), 2), "title")
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}
