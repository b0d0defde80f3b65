"""What is shipped to the train workers: data sets, and the modules next to the user's script."""

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
    """Those that Ray Train is to split into one shard per train worker."""
    return {name: dataset for name, dataset in datasets.items() if isinstance(dataset, ray.data.Dataset)}


def for_workers(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets as the train workers get them. Raises DataError for one that cannot be pickled."""
    shipped: dict[str, Any] = {}
    for name, dataset in datasets.items():
        if isinstance(dataset, ray.data.Dataset):
            shipped[name] = RayDataShard(partial(_read_shard, name))
            continue
        try:
            cloudpickle.dumps(dataset)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise DataError(
                f"datasets[{name!r}]: found a {type(dataset).__name__} that cannot be pickled ({error}); needed one "
                "that can, since it is sent to the train workers. Open files and connections at their first use there."
            ) from error
        shipped[name] = dataset
    return shipped


def check_room(sharded: Mapping[str, Any], needs: Needs, cluster: Capacity) -> None:
    """Refuse data sets whose tasks would wait forever because the plan takes every CPU that the cluster can have."""
    taken = needs.total().get("CPU", 0.0)
    if sharded and cluster.known and cluster.can_have("CPU") < taken + 1:
        raise InfeasiblePlanError(
            f"datasets[{next(iter(sharded))!r}]: the tasks of a ray.data.Dataset need at least 1 CPU besides the "
            f"{taken:g} that the plan requests; the cluster has {cluster.has('CPU'):g} and can have "
            f"{cluster.can_have('CPU'):g}. Add CPUs, or use Parquet, which the train workers read themselves."
        )


def _read_shard(name: str, rows: int, drop_last: bool) -> Iterator[Mapping[str, torch.Tensor]]:
    shard = ray.train.get_dataset_shard(name)
    return iter(shard.iter_torch_batches(batch_size=rows, drop_last=drop_last, device="cpu"))


def send_script_modules() -> None:
    """Pickle the modules below the script's folder by value if the workers could not import them."""
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
