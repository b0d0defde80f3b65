"""The board: what it keeps, and that its process stays small."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import ray

from raypar.cluster.board import Board


def test_reports_are_handed_out_once() -> None:
    board = Board()
    board.push({"kind": "started"})
    board.push({"kind": "progress", "step": 1})
    assert board.poll() == ([{"kind": "started"}, {"kind": "progress", "step": 1}], None)
    assert board.poll() == ([], None)


def test_the_newest_history_replaces_the_one_before() -> None:
    board = Board()
    board.push({"kind": "history", "rows": [{"loss": 2.0}]})
    board.push({"kind": "history", "rows": [{"loss": 2.0}, {"loss": 1.0}]})
    assert board.poll() == ([], [{"loss": 2.0}, {"loss": 1.0}])


def imports_torch(board: Board) -> bool:
    return "torch" in sys.modules


@pytest.mark.usefixtures("nothing_left")
def test_its_process_runs_without_torch() -> None:
    """It held 440 MB, of which raypar's package had imported torch alone 300, for a list of a few reports."""
    own_process = {"env_vars": {"RAYPAR_TEST": "board"}}  # not one of Ray's that has run something else before
    remote_class: Any = ray.remote(num_cpus=0, runtime_env=own_process)(Board)
    board = remote_class.remote()
    ray.get(board.push.remote({"kind": "started"}))
    assert not ray.get(board.__ray_call__.remote(imports_torch))
    ray.kill(board)
