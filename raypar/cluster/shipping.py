"""What travels to the train workers: data sets, and the modules beside the user's script."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import torch
from ray import cloudpickle

from raypar.cluster.capacity import Capacity
from raypar.cluster.placement import Needs
from raypar.data.sources import RayDataShard
from raypar.errors import DataError, InfeasiblePlanError


def of_ray_data(datasets: Mapping[str, Any]) -> dict[str, ray.data.Dataset]:
    """Those that Ray Train is to cut into a shard for each train worker."""
    return {name: given for name, given in datasets.items() if isinstance(given, ray.data.Dataset)}


def for_workers(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """What the train workers get. Raises DataError for what cannot be pickled."""
    found: dict[str, Any] = {}
    for name, given in datasets.items():
        if isinstance(given, ray.data.Dataset):
            found[name] = RayDataShard(partial(_read_shard, name))
            continue
        try:
            cloudpickle.dumps(given)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise DataError(
                f"datasets[{name!r}]: found a {type(given).__name__} that cannot be pickled, needed one that can: "
                f"it travels to the train workers: {error}. Open files and connections there at the first use."
            ) from error
        found[name] = given
    return found


def check_room(sharded: Mapping[str, Any], needs: Needs, cluster: Capacity) -> None:
    """Refuses data sets whose tasks would wait for ever, since the plan takes every CPU that the cluster can have."""
    taken = needs.total().get("CPU", 0.0)
    if sharded and cluster.known and cluster.can_have("CPU") < taken + 1:
        raise InfeasiblePlanError(
            f"datasets[{next(iter(sharded))!r}]: the tasks of a ray.data.Dataset need at least 1 CPU beside the "
            f"{taken:g} that the plan asks for; the cluster has {cluster.has('CPU'):g} and can have "
            f"{cluster.can_have('CPU'):g}. Give it more, or give Parquet, which the train workers read themselves."
        )


def _read_shard(name: str, rows: int, drop_last: bool) -> Iterator[Mapping[str, torch.Tensor]]:
    shard = ray.train.get_dataset_shard(name)
    return iter(shard.iter_torch_batches(batch_size=rows, drop_last=drop_last, device="cpu"))


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
