"""Which resources a plan needs, whether the cluster can provide them, and which stage goes where.

plan ── needs_of ──▶ Needs ── check_feasible ──▶ or InfeasiblePlanError, before anything starts
                       │
                       └── reserve ──▶ one placement group, one bundle per stage actor ── arrange ──▶
                           bundle of (replica, actor), neighbours on one node if possible
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.v2.api.config import ScalingConfig
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from raypar.cluster import capacity
from raypar.cluster.capacity import Capacity
from raypar.errors import ConfigError, InfeasiblePlanError, TimeoutExceededError
from raypar.planning.plan import Plan, Timeouts
from raypar.workers import ray_private
from raypar.workers.ray_private import Resources

_POLL_S = 1.0


@dataclass(frozen=True)
class Needs:
    """What a plan requests from the cluster.

    stage:     what each stage actor requests; `stages` is how many there are, 0 without a pipeline.
    worker:    what each train worker requests; there are `plan.data` of them.
    selectors: Ray labels that the machine of each stage actor must have, one dict per actor; or None.
    """

    plan: Plan
    stage: Resources
    worker: Resources
    strategy: str = "PACK"
    selectors: list[dict[str, str]] | None = None

    @property
    def stages(self) -> int:
        return self.plan.world_size if self.plan.pipeline > 1 else 0

    @property
    def bundle(self) -> Resources:
        """What each process that holds the model requests: the stage actors, or without a pipeline the workers."""
        return self.stage if self.stages else self.worker

    @property
    def bundles(self) -> int:
        return self.stages or self.plan.data

    def total(self) -> Resources:
        total: Counter[str] = Counter()
        for bundle, count in ((self.stage, self.stages), (self.worker, self.plan.data)):
            for name, amount in bundle.items():
                total[name] += amount * count  # type: ignore[assignment]  # a Counter of floats adds up as well
        return dict(total)


def check_scaling(plan: Plan, scaling: ScalingConfig | None) -> None:
    """Raise ConfigError for a ScalingConfig that contradicts the plan."""
    if scaling is None:
        return
    workers = scaling.num_workers
    # 1 is ScalingConfig's default, so it may stand for "not given".
    if workers not in (1, plan.data):
        raise ConfigError(
            f"ScalingConfig(num_workers={workers}) contradicts Plan(data={plan.data}): raypar runs one train worker "
            "per replica. Leave `num_workers` out, or change `data`."
        )
    if scaling.use_tpu or scaling.topology:
        raise ConfigError(
            "ScalingConfig(use_tpu=…, topology=…) found, but raypar trains on GPUs and CPUs only; leave them out."
        )
    resources = _resources_per_worker(scaling)
    if plan.pipeline > 1 and resources.get("GPU", 0) > 0:
        raise ConfigError(
            f"ScalingConfig(resources_per_worker={resources}) requests GPUs, but with Plan(pipeline={plan.pipeline}) "
            "the stage actors hold the model and the train workers only feed them; say what a stage requests with "
            "Trainer(resources_per_stage=…)."
        )


def _resources_per_worker(scaling: ScalingConfig | None) -> Resources:
    resources: Any = scaling.resources_per_worker if scaling is not None else None
    return dict(resources or {})


def check_resources_per_stage(resources: Any) -> None:
    """Raise ConfigError for amounts that Ray cannot reserve."""
    if resources is None:
        return
    wrong = not isinstance(resources, Mapping) or any(
        not isinstance(name, str) or isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0
        for name, amount in resources.items()
    )
    if wrong or not any(resources.values()):
        raise ConfigError(
            f"Trainer(resources_per_stage={resources!r}): needed a dict of resource names to amounts with at least "
            'one amount above 0, such as {"CPU": 1, "GPU": 1}.'
        )


def needs_of(
    plan: Plan,
    scaling: ScalingConfig | None = None,
    resources_per_stage: Mapping[str, float] | None = None,
    *,
    gpus: bool,
) -> Needs:
    """What the plan needs on a cluster with or without GPUs, where the user does not say it; `scaling` has passed
    `check_scaling`."""
    use_gpu = scaling.use_gpu if scaling is not None else gpus
    if plan.pipeline == 1:
        default = {"CPU": 1.0, "GPU": 1.0} if use_gpu else {"CPU": 1.0}
        worker = _resources_per_worker(scaling) or default
        if use_gpu:
            worker.setdefault("GPU", 1.0)
        if scaling is not None and scaling.accelerator_type:
            worker[f"accelerator_type:{scaling.accelerator_type}"] = 0.001
        return Needs(plan, {}, worker)
    on_gpu = gpus or (scaling is not None and bool(scaling.use_gpu))
    stage = dict(resources_per_stage or ({"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": 1.0}))
    if scaling is None:
        return Needs(plan, stage, {"CPU": 1.0})
    if scaling.accelerator_type:
        stage[f"accelerator_type:{scaling.accelerator_type}"] = 0.001
    return Needs(
        plan,
        stage,
        _resources_per_worker(scaling) or {"CPU": 1.0},
        scaling.placement_strategy if isinstance(scaling.placement_strategy, str) else "PACK",
        _selectors_of_stages(plan, scaling),
    )


def _selectors_of_stages(plan: Plan, scaling: ScalingConfig) -> list[dict[str, str]] | None:
    """Worker r's label selector applies to the stage actors of replica r, which hold its model."""
    if scaling.label_selector is None:
        return None
    if isinstance(scaling.label_selector, dict):
        return [dict(scaling.label_selector)] * plan.world_size
    return [dict(selector) for selector in scaling.label_selector for _ in range(plan.pipeline)]


def is_feasible_now(needs: Needs, cluster: Capacity) -> bool:
    """Whether the machines that are up could run the plan if nobody else used them."""
    enough = all(cluster.has(name) + 1e-6 >= amount for name, amount in needs.total().items())
    return enough and cluster.slots_now(needs.bundle) >= needs.bundles


def check_feasible(needs: Needs, cluster: Capacity) -> None:
    """Raise InfeasiblePlanError for a plan that even the fully grown cluster could not run, naming both numbers."""
    if not cluster.known or is_feasible_now(needs, cluster):
        return
    total = needs.total()
    # GPUs first: if they are missing, nobody wants to read about CPUs.
    for name in sorted(total, key=lambda name: (name != "GPU", name)):
        if cluster.can_have(name) + 1e-6 < total[name]:
            raise InfeasiblePlanError(
                f"{_plan(needs.plan)} needs {_amount(total[name], name)} ({_requests(needs, name)}); the cluster has "
                f"{_number(cluster.has(name))} and {_growth(cluster, name)}. {_knobs(needs, name)}"
            )
    if cluster.slots(needs.bundle) < needs.bundles:
        bundle = " and ".join(_amount(amount, name) for name, amount in needs.bundle.items())
        raise InfeasiblePlanError(
            f"{_plan(needs.plan)} needs room for {needs.bundles} times {bundle}, each on one machine; the machines "
            f"of the cluster hold {_number(cluster.slots_now(needs.bundle))} of them now and "
            f"{_number(cluster.slots(needs.bundle))} when it is fully grown. {_knobs(needs, 'machines')}"
        )


def _plan(plan: Plan) -> str:
    return f"Plan(data={plan.data}, pipeline={plan.pipeline})"


def _number(amount: float) -> str:
    return f"{amount:g}"


def _amount(amount: float, name: str) -> str:
    plural = name in ("CPU", "GPU") and amount != 1
    return f"{_number(amount)} {name}{'s' if plural else ''}"


def _requests(needs: Needs, name: str) -> str:
    words = []
    for process, count, amount in (
        ("stage actor", needs.stages, needs.stage.get(name, 0)),
        ("train worker", needs.plan.data, needs.worker.get(name, 0)),
    ):
        if count and amount:
            words.append(f"{count} {process}{'s' if count > 1 else ''} with {_number(amount)} each")
    return ", ".join(words)


def _growth(cluster: Capacity, name: str) -> str:
    if not cluster.largest:
        return "has no autoscaler that could add more"
    return f"can scale to {_number(cluster.can_have(name))}"


def _knobs(needs: Needs, name: str) -> str:
    argument = "resources_per_stage" if needs.stages else "scaling_config"
    product = "`data` or `pipeline`" if needs.stages else "`data`"
    end = ", or train on CPUs with Trainer(resources_per_stage={'CPU': 1})" if needs.stages and name == "GPU" else ""
    return f"Lower {product} in the Plan, lower Trainer({argument}=…), or let the cluster grow{end}."


def reserve(needs: Needs, timeouts: Timeouts) -> PlacementGroup:
    """A placement group with a bundle for each process that holds the model; waits until it is placed."""
    group: PlacementGroup = placement_group(
        [dict(needs.bundle) for _ in range(needs.bundles)],
        strategy=needs.strategy,
        bundle_label_selector=needs.selectors,
    )
    try:
        _wait_until_placed(group, needs, timeouts)
    except BaseException:  # after Ctrl-C while a machine starts, nothing is left either
        remove_placement_group(group)
        raise
    return group


def _wait_until_placed(group: PlacementGroup, needs: Needs, timeouts: Timeouts) -> None:
    deadline = time.monotonic() + timeouts.start
    while not group.wait(max(0.1, min(_POLL_S, deadline - time.monotonic()))):
        refused = ray_private.refused_placement_groups() or []
        if any(group.id.hex() in verdict for verdict in refused) and not capacity.full_capacity("GPU").known:
            raise InfeasiblePlanError(
                f"{_plan(needs.plan)} needs {needs.bundles} times {needs.bundle}; the cluster has "
                f"{_in_cluster(needs.bundle)}, and its autoscaler says that it can never add that much. "
                f"{_knobs(needs, 'GPU')}"
            )
        if time.monotonic() > deadline:
            available: Resources = ray.available_resources()  # type: ignore[no-untyped-call]
            free = {name: available.get(name, 0.0) for name in needs.bundle}
            raise TimeoutExceededError(
                f"{_plan(needs.plan)} waited {_number(timeouts.start)} s for {needs.bundles} times {needs.bundle}; "
                f"free in the cluster: {free}. Other jobs may use the rest, or new machines may need longer: raise "
                "Timeouts(start=…), or look at `ray status`."
            )


def _in_cluster(bundle: Resources) -> str:
    cluster = capacity.current_capacity()
    return " and ".join(_amount(cluster.has(name), name) for name in bundle)


def nodes_of_bundles(group: PlacementGroup) -> list[str]:
    """The node id of each bundle of a placed group."""
    placed: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [placed[index] for index in sorted(placed)]


def arrange(nodes: Sequence[str], data: int, pipeline: int) -> list[list[int]]:
    """The bundle of each stage actor: `arrange(…)[replica][actor]`, neighbours on one node if possible.

        bundles   0  1  2  3  4  5          replica 0: bundles 0 2 (node a)
        nodes     a  b  a  b  a  b   ──▶    replica 1: bundles 4 5 (a, b)      data=3, pipeline=2
                                            replica 2: bundles 1 3 (node b)

    Each node first gets as many whole replicas as it has bundles for; the remaining bundles are joined node by node.
    The replicas are ordered by the node of their first stage, because Ray Train numbers its workers node by node, and
    worker r should run on the node of stage (r, 0).
    """
    bundles_of: dict[str, list[int]] = defaultdict(list)
    for bundle, node in enumerate(nodes):
        bundles_of[node].append(bundle)
    replicas: list[list[int]] = []
    rest: list[int] = []
    for bundles in bundles_of.values():
        whole = len(bundles) // pipeline * pipeline
        replicas += [bundles[i : i + pipeline] for i in range(0, whole, pipeline)]
        rest += bundles[whole:]
    replicas += [rest[i : i + pipeline] for i in range(0, len(rest), pipeline)]
    assert len(replicas) == data
    number = {node: position for position, node in enumerate(bundles_of)}
    return sorted(replicas, key=lambda replica: number[nodes[replica[0]]])


def pins_of_workers(
    first_nodes: Sequence[str], worker: Resources, free_cpus: Mapping[str, float]
) -> list[dict[str, str]] | None:
    """The label selectors that put worker r on the node of stage (r, 0); None if they do not all fit.

    Either all workers are pinned or none: Ray Train would number a mixture in another order.
    """
    for node, workers in Counter(first_nodes).items():
        if free_cpus.get(node, 0.0) + 1e-6 < workers * worker.get("CPU", 0.0):
            return None
    return [{"ray.io/node-id": node} for node in first_nodes]
