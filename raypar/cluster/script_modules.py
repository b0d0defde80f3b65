"""The modules beside the user's script, which a submitted job's workers cannot import.

    ray job submit --working-dir . -- python jobs/train.py        train.py says `import models`, for jobs/models.py

Ray gives the workers the working directory, from whose top they import; the folder of the script below it they
do not know. So these modules travel with the train loop, by value.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray import cloudpickle


def send_script_modules() -> None:
    """Have the modules below the script's folder pickled by value, where the workers could not import them."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or not ray.get_runtime_context().runtime_env.get("working_dir"):
        return
    folder = Path(script).resolve().parent
    if folder == Path.cwd():  # the top of the working directory, from which workers import
        return
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is not None and module.__name__ != "__main__" and folder in Path(file).resolve().parents:
            cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]  # Ray's copy has no types
