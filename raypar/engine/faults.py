"""What an exception inside a step means: an error of the user's code, a lost peer, or a time limit that has passed."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from raypar.errors import PeerLostError, RayparError, RunError, TimeoutExceededError, UserCodeError
from raypar.planning.place import Place


def is_of_connection(error: BaseException) -> bool:
    """Whether an error comes from torch.distributed. Gloo raises plain RuntimeErrors that name its source file;
    operations pending on a pair that timed out say 'timeout caused pair closure' instead."""
    texts = ("/gloo/", "timeout caused pair closure", "NCCL")
    is_named = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return is_named or isinstance(error, dist.DistError)


def failed_wait(place: Place, operation: str, error: BaseException) -> RunError:
    """The error for an exchange with another process that failed: `operation`, at a place."""
    address, replica, stage = f"{place}: {operation}", place.replica, place.stage
    reason = str(error).strip().partition("\n")[0]
    if not is_of_connection(error):
        return RunError(f"{address} failed: {type(error).__name__}: {reason}", replica=replica, stage=stage)
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        return TimeoutExceededError(
            f"{address} took longer than Timeouts(peer=…) allows; the other side is stuck or slow ({reason})",
            replica=replica,
            stage=stage,
        )
    return PeerLostError(f"{address} failed, since the other side is gone ({reason})", replica=replica, stage=stage)


@contextmanager
def user_code(place: Place, operation: str) -> Iterator[None]:
    """Raise a UserCodeError with an address for an exception of the user's model, loss or optimizer; errors of raypar
    pass unchanged."""
    try:
        yield
    except RayparError:
        raise
    except Exception as error:
        if is_of_connection(error):  # DDP reduces within the backward pass
            raise failed_wait(place, operation, error) from error
        raise user_code_error(place, operation, error) from error


def user_code_error(place: Place, operation: str, error: BaseException) -> UserCodeError:
    """The error for an exception of the user's code. Its message has the traceback as text, since `__cause__` is lost
    between processes; its `original` is the exception itself if that can be pickled, else None."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    wrapped = UserCodeError(
        f"{place}: {operation} raised {type(error).__name__}: {error}\n{trace}",
        replica=place.replica,
        stage=place.stage,
        original=_if_it_pickles(error),
    )
    wrapped.__cause__ = error
    return wrapped


def _if_it_pickles(error: BaseException) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class whose __init__ takes other arguments, a lock inside, …: its text is in the message
        return None
    return error
