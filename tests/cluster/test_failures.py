"""What a failed attempt is blamed on, and whether it is repeated: decisions only, no process is started."""

from __future__ import annotations

import pickle

import pytest
import ray.train

from raypar.cluster.failures import Tally, explains_itself, retries_left, root_cause
from raypar.errors import (
    DataError,
    NonFiniteError,
    PeerLostError,
    RayparError,
    RunError,
    StageDiedError,
    TimeoutExceededError,
    UserCodeError,
    WorkerDiedError,
)
from raypar.workers.ray_errors import as_raypar_error


def test_an_exception_of_the_user_stays_the_cause() -> None:
    """It crosses two process borders, at which Python loses `__cause__`."""
    sent = pickle.loads(pickle.dumps(as_raypar_error(ValueError("bad batch"), replica=1)))
    found = root_cause(ray.train.WorkerGroupError("", {0: PeerLostError("lost", replica=0), 1: sent}), 60)
    assert isinstance(found, UserCodeError)
    assert isinstance(found.__cause__, ValueError)
    assert found.replica == 1


@pytest.mark.parametrize(
    ("error", "explains"),
    [
        (UserCodeError("x"), True),
        (DataError("x"), True),
        (WorkerDiedError("x", preempted=True), True),
        (WorkerDiedError("x"), False),
        (PeerLostError("x"), False),
        (TimeoutExceededError("x"), False),
    ],
)
def test_which_errors_explain_themselves(error: RayparError, explains: bool) -> None:
    assert explains_itself(error) is explains


class TestRetries:
    def test_not_at_all_by_default(self) -> None:
        error = StageDiedError("x")
        assert retries_left(error, Tally().after(error), ray.train.FailureConfig()) is None

    def test_as_often_as_max_failures_says(self) -> None:
        error, tally, config = WorkerDiedError("x"), Tally(), ray.train.FailureConfig(max_failures=2)
        allowed = []
        for _ in range(3):
            tally = tally.after(error)
            allowed.append(retries_left(error, tally, config))
        assert allowed == ["1 of max_failures=2", "2 of max_failures=2", None]

    def test_without_limit(self) -> None:
        tally = Tally(failures=1000)
        assert retries_left(UserCodeError("x"), tally, ray.train.FailureConfig(max_failures=-1)) is not None

    @pytest.mark.parametrize("error", [StageDiedError("x", preempted=True), WorkerDiedError("x", preempted=True)])
    def test_a_reclaimed_machine_does_not_count_against_max_failures(self, error: RunError) -> None:
        tally = Tally().after(error)
        assert tally == Tally(failures=0, preemptions=1)
        assert retries_left(error, tally, ray.train.FailureConfig()) is not None
        assert retries_left(error, tally, ray.train.FailureConfig(max_preemption_failures=0, max_failures=9)) is None

    @pytest.mark.parametrize("error", [DataError("x"), NonFiniteError("x", step=1, stage=None)])
    def test_what_will_come_again_is_never_repeated(self, error: RayparError) -> None:
        assert retries_left(error, Tally().after(error), ray.train.FailureConfig(max_failures=-1)) is None
