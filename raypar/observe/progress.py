"""How far a run is, for the person who waits for it: a live bar in a terminal, plain lines in a log.

epoch 2/5 ━━━━━━━━━━━━╸━━━━━━━ 14/23 step 37 loss 0.412 893 samples/s
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from raypar.planning.plan import Plan


class ProgressDisplay:
    """Shows the newest report; a context manager, so that the terminal is always restored.

    A report is a dict of "epoch", "epochs", "step", "done" (batches of this epoch that are done), "total"
    (batches in this epoch), "loss" and "samples_per_s"; each may be None or missing.
    """

    def __init__(self, console: Console | None = None, every_s: float = 5.0) -> None:
        self._console = console or Console(stderr=True)  # stdout is the script's own
        self._every_s = every_s
        self._bar: Progress | None = None
        self._unwritten: Mapping[str, Any] = {}
        self._last_time = -every_s

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, report: Mapping[str, Any]) -> None:
        if self._console.is_terminal:
            self._draw(report)
        else:
            self._write(report)

    def _draw(self, report: Mapping[str, Any]) -> None:
        if self._bar is None:
            # The bar appears with the first report, so that what is printed during start-up is undisturbed. It also
            # redirects stdout, so that lines from train loops scroll by above it.
            self._bar = Progress(
                TextColumn("{task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.fields[rest]}"),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("", epoch="", rest="")
        self._bar.update(
            self._bar.task_ids[0],
            completed=report.get("done") or 0,
            total=report.get("total"),
            epoch=epoch_text(report),
            rest=rest_text(report),
        )
        self._bar.start()  # does nothing from the second time on

    def _write(self, report: Mapping[str, Any]) -> None:
        if self._unwritten and self._unwritten.get("epoch") != report.get("epoch"):
            self._flush()  # the last report of the previous epoch
        self._unwritten = report
        if time.monotonic() - self._last_time >= self._every_s:
            self._flush()

    def _flush(self) -> None:
        if self._unwritten:
            self.say(f"{epoch_text(self._unwritten)} {rest_text(self._unwritten)}".strip())
        self._unwritten, self._last_time = {}, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def schedule_text(plan: Plan) -> str:
    """ "1f1b, 8 micro-batches; activations kept at most, per actor: 2, 1": each of one stage and micro-batch."""
    most = ", ".join(map(str, plan.bounds.activations))
    return f"{plan.schedule_name}, {plan.microbatch_count} micro-batches; activations kept at most, per actor: {most}"


def epoch_text(report: Mapping[str, Any]) -> str:
    """ "epoch 2/5": the running epoch, counted from 1."""
    epoch, epochs = report.get("epoch"), report.get("epochs")
    if epoch is None:
        return ""
    return f"epoch {epoch + 1}/{epochs}" if epochs is not None else f"epoch {epoch + 1}"


def rest_text(report: Mapping[str, Any]) -> str:
    """ "14/23 step 37 loss 0.412 893 samples/s", as far as they are known."""
    parts = []
    done, total = report.get("done"), report.get("total")
    if done is not None:
        parts.append(f"{done}/{total}" if total is not None else f"{done} batches")
    if report.get("step") is not None:
        parts.append(f"step {report['step']}")
    if report.get("loss") is not None:
        parts.append(f"loss {report['loss']:.4g}")
    if report.get("samples_per_s") is not None:
        parts.append(f"{report['samples_per_s']:.0f} samples/s")
    return " ".join(parts)
