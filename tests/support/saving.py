"""What the processes of a test do: they train, and save while they train."""

from __future__ import annotations

import os
import resource
import signal

from raypar.checkpoint.saver import SaveRequest, SharedSaver
from raypar.engine.actor_state import model_of, state_to_save
from raypar.errors import CheckpointError
from raypar.storage import Storage
from raypar.transport.interface import drive
from raypar.transport.process_links import ProcessTransport
from support.engines import request_of
from support.processes import Me
from support.work import Training, engine_of


def save_behind_each_step(me: Me, training: Training, folder: str, fault: str | None = None) -> list[object]:
    """Begins a checkpoint behind each step, takes the next step while it is written, and then waits for it. With a
    fault the last rank cannot write the first one ("full") or dies while it does ("dies").

    Returns, of each step, this process's part of the weights, or the error with which the checkpoint ended.
    """
    plan, storage = training.plan, Storage.open(folder, "run")
    engine = engine_of(me, training)
    assert isinstance(engine.transport, ProcessTransport)
    assert engine.transport.saving is not None
    saver = SharedSaver(storage, engine.transport.saving, me.timeouts.peer)
    found: list[object] = []
    is_faulty = fault is not None and me.rank == me.size - 1
    for step, batch in enumerate(training.batches(), start=1):
        shares = list(zip(*(tensor.split(training.rows[step - 1]) for tensor in batch), strict=True))
        drive(engine.train_step(request_of(step, shares[engine.replica])))
        if step > 1:
            try:
                saver.wait()
            except CheckpointError as error:
                found[-1] = error
            allow_files_of(resource.RLIM_INFINITY)
        if is_faulty and step == 1:
            allow_files_of(64)
            if fault == "dies":
                signal.signal(signal.SIGXFSZ, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        manifest = {
            "step": step,
            "plan": plan.as_dict(),
            "position": {},
            "history": [],
            "names": list(engine.part.names),
        }
        request = SaveRequest(step, f"{storage.path}/checkpoint_{step:08d}", manifest)
        found.append(model_of(engine))
        saver.start(request, state_to_save(engine, request))
    saver.wait()
    return found


def allow_files_of(most: int) -> None:
    """How large a file of this process may become, in bytes. Beyond it a write fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
