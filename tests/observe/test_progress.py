from __future__ import annotations

import io

from rich.console import Console

from raypar.observe.progress import ProgressDisplay

REPORT = {"epoch": 0, "epochs": 2, "step": 3, "done": 3, "total": 8, "loss": 0.51239, "samples_per_s": 812.4}


def shown(reports: list[dict[str, object]], *, terminal: bool, every_s: float = 0.0) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, _environ={"TERM": "xterm"})
    with ProgressDisplay(console, every_s) as display:
        for report in reports:
            display.update(report)
    return file.getvalue()


def test_a_log_gets_a_line_a_report() -> None:
    assert shown([REPORT], terminal=False) == "epoch 1/2 3/8 step 3 loss 0.5124 812 samples/s\n"


def test_what_is_not_known_is_left_out() -> None:
    assert shown([{"step": 3, "epoch": None, "loss": None, "done": 3}], terminal=False) == "3 batches step 3\n"


def test_a_log_gets_few_lines() -> None:
    """But always the end of an epoch."""
    reports = [{"epoch": epoch, "epochs": 2, "step": epoch * 8 + done} for epoch in range(2) for done in range(1, 9)]
    assert shown(reports, terminal=False, every_s=1000).splitlines() == [
        "epoch 1/2 step 1",
        "epoch 1/2 step 8",
        "epoch 2/2 step 16",
    ]


def test_a_terminal_gets_a_bar() -> None:
    """Which disappears at the end."""
    text = shown([REPORT, {**REPORT, "step": 4}], terminal=True)
    assert "epoch 1/2" in text
    assert "━" in text
    assert text.endswith("\x1b[2K")


def test_nothing_is_shown_before_the_first_report() -> None:
    assert shown([], terminal=True) == ""
