"""What an exception means, and whose it is."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from raypar.engine.faults import failed_wait, is_of_connection, user_code
from raypar.errors import DataError, PeerLostError, RunError, TimeoutExceededError, UserCodeError
from raypar.planning.place import Place

CLOSED = RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
LATE = RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/buffer.cc:91] Timed out waiting 2000ms for recv")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (CLOSED, PeerLostError, "the other side is gone"),
        (dist.DistNetworkError("broken pipe"), PeerLostError, "the other side is gone"),
        (LATE, TimeoutExceededError, "longer than Timeouts"),
        (RuntimeError("out of memory"), RunError, "failed: RuntimeError: out of memory"),
    ],
)
def test_a_failed_exchange_says_where_and_why(error: Exception, kind: type[RunError], words: str) -> None:
    """History: any RuntimeError was a lost peer, out of memory too, which the losses that it caused then masked."""
    failure = failed_wait(Place(1, (2,)), "the commit", error)
    assert type(failure) is kind
    assert str(failure).startswith("replica 1, stage 2: the commit")
    assert words in str(failure)
    assert (failure.replica, failure.stage) == (1, 2)


def test_which_errors_are_of_the_connection() -> None:
    assert is_of_connection(CLOSED)
    assert not is_of_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_of_connection(ValueError("/gloo/"))


def test_user_code_errors_keep_cause_and_traceback() -> None:
    with pytest.raises(UserCodeError) as caught, user_code(Place(0, (1,)), "forward"):
        raise KeyError("weights")
    assert "replica 0, stage 1: forward raised KeyError: 'weights'" in str(caught.value)
    assert 'raise KeyError("weights")' in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_of_raypar_pass_unchanged() -> None:
    with pytest.raises(DataError, match="no rows"), user_code(Place(0), "forward"):
        raise DataError("no rows")


def test_a_lost_peer_is_not_the_users_fault() -> None:
    """DDP reduces inside the user's backward pass."""
    with pytest.raises(PeerLostError), user_code(Place(0, (0,)), "backward"):
        raise CLOSED
