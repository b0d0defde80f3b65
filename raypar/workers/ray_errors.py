"""What an error means that comes out of Ray or out of user code: the RayparError that says it."""

from __future__ import annotations

import pickle
import traceback

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from raypar.engine.faults import failed_wait, is_of_connection
from raypar.errors import PeerLostError, RayparError, UserCodeError
from raypar.planning.place import Place

_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)


def as_raypar_error(error: BaseException, replica: int) -> RayparError:
    """What a train worker raises in place of `error`.

    Ray Train hands the driver an exception without its traceback and its cause, and fails in another way
    where the exception cannot be pickled; so both become part of a UserCodeError while they are at hand.
    """
    found = unwrapped(error)
    if isinstance(found, RayparError):
        return found
    if isinstance(found, _DEATHS):
        return PeerLostError(f"The train worker of replica {replica} lost a stage actor: {found}", replica=replica)
    if is_of_connection(found):
        return failed_wait(Place(replica), "the train worker's wait for those of other replicas", found)
    return user_code_error(found, replica)


def unwrapped(error: BaseException) -> BaseException:
    """The error that a remote call failed with, out of the one in which Ray hands it over."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def user_code_error(error: BaseException, replica: int | None) -> UserCodeError:
    """An exception of the user's code with its traceback as text; `original` is the exception if it pickles."""
    text = "".join(traceback.format_exception(error)).rstrip()
    where = f" of replica {replica}" if replica is not None else ""
    wrapped = UserCodeError(
        f"{type(error).__name__} in the train loop{where}: {error}\n{text}",
        replica=replica,
        original=_if_it_pickles(error),
    )
    wrapped.__cause__ = error
    return wrapped


def _if_it_pickles(error: BaseException) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class of its own __init__, a lock inside, …: its text is in the message
        return None
    return error


def death(error: BaseException) -> str:
    """What Ray knows about a death, without the lines that name Ray's own ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    kept = [line for line in lines if not line.startswith("The actor died unexpectedly before finishing this task")]
    text = " ".join(kept) or str(error)
    return text.split(" Some common causes include")[0]
