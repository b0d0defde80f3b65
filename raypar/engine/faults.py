"""What an exception means, and whose it is: the user's code, a lost peer, or a limit that has passed."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from raypar.errors import PeerLostError, RayparError, RunError, TimeoutExceededError, UserCodeError
from raypar.planning.place import Place


def is_of_connection(error: BaseException) -> bool:
    """Whether an error is one of torch.distributed. Gloo's are plain RuntimeErrors that name its source file, but for
    what else was under way when a wait on the same pair had run into its limit."""
    texts = ("/gloo/", "timeout caused pair closure", "NCCL")
    named = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return named or isinstance(error, dist.DistError)


def failed_wait(place: Place, what: str, error: BaseException) -> RunError:
    """What it means that an exchange with another process, `what`, failed at a place."""
    where, replica, stage = f"{place}: {what}", place.replica, place.stage
    reason = str(error).strip().partition("\n")[0]
    if not is_of_connection(error):
        return RunError(f"{where} failed: {type(error).__name__}: {reason}", replica=replica, stage=stage)
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        return TimeoutExceededError(
            f"{where} took longer than Timeouts(peer=…) allows; the other side is stuck or slow ({reason})",
            replica=replica,
            stage=stage,
        )
    return PeerLostError(f"{where} failed, since the other side is gone ({reason})", replica=replica, stage=stage)


@contextmanager
def user_code(place: Place, what: str) -> Iterator[None]:
    """Give an exception of the user's model, loss or optimizer an address; raypar's own errors have one."""
    try:
        yield
    except RayparError:
        raise
    except Exception as error:
        if is_of_connection(error):  # DDP reduces within the backward pass
            raise failed_wait(place, what, error) from error
        raise user_code_error(place, what, error) from error


def user_code_error(place: Place, what: str, error: BaseException) -> UserCodeError:
    """The error for an exception of the user's code, with its traceback as text: both survive a process border, where
    `__cause__` is lost. `original` is the exception itself if it can be pickled."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    wrapped = UserCodeError(
        f"{place}: {what} raised {type(error).__name__}: {error}\n{trace}",
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
