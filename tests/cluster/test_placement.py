from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import ray.train

from raypar.cluster.capacity import Capacity, Machines, grown
from raypar.cluster.placement import (
    Needs,
    arrange,
    check_feasible,
    check_resources_per_stage,
    check_scaling,
    is_feasible_now,
    needs_of,
    pins_of_workers,
)
from raypar.errors import ConfigError, InfeasiblePlanError
from raypar.planning.plan import Plan

GPU_MACHINE = Machines({"CPU": 4, "GPU": 2})


class TestNeeds:
    def test_stages_request_gpus_and_workers_do_not(self) -> None:
        needs = needs_of(Plan(data=2, pipeline=3), gpus=True)
        assert needs.stage == {"CPU": 1, "GPU": 1}
        assert needs.worker == {"CPU": 1}
        assert needs.total() == {"CPU": 8, "GPU": 6}

    def test_stages_ask_for_cpus_where_there_are_no_gpus(self) -> None:
        assert needs_of(Plan(data=2, pipeline=3), gpus=False).total() == {"CPU": 8}

    def test_resources_per_stage_are_what_a_stage_asks_for(self) -> None:
        needs = needs_of(Plan(pipeline=2), None, {"CPU": 2, "memory": 100}, gpus=True)
        assert needs.total() == {"CPU": 5, "memory": 200}

    def test_without_a_pipeline_the_workers_hold_the_model(self) -> None:
        assert needs_of(Plan(data=2), gpus=True).total() == {"CPU": 2, "GPU": 2}
        assert needs_of(Plan(data=2), gpus=False).total() == {"CPU": 2}

    def test_use_gpu_decides_for_workers_when_a_scaling_config_is_given(self) -> None:
        assert needs_of(Plan(data=2), ray.train.ScalingConfig(num_workers=2), gpus=True).total() == {"CPU": 2}
        on_gpu = needs_of(Plan(data=2), ray.train.ScalingConfig(use_gpu=True), gpus=False)
        assert on_gpu.total() == {"CPU": 2, "GPU": 2}

    def test_resources_per_worker_are_respected(self) -> None:
        scaling = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 3})
        assert needs_of(Plan(data=2, pipeline=2), scaling, gpus=False).total() == {"CPU": 10}

    def test_a_worker_label_selector_applies_to_its_stages(self) -> None:
        scaling = ray.train.ScalingConfig(num_workers=2, label_selector=[{"zone": "a"}, {"zone": "b"}])
        needs = needs_of(Plan(data=2, pipeline=2), scaling, gpus=False)
        assert needs.selectors == [{"zone": "a"}, {"zone": "a"}, {"zone": "b"}, {"zone": "b"}]

    @pytest.mark.parametrize(
        ("scaling", "words"),
        [
            ({"num_workers": 3}, "num_workers=3"),
            ({"num_workers": (1, 2)}, "num_workers"),
            ({"num_workers": 2, "use_gpu": True, "resources_per_worker": {"GPU": 1}}, "resources_per_stage"),
        ],
    )
    def test_a_scaling_config_against_the_plan_is_refused(self, scaling: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
            check_scaling(Plan(data=2, pipeline=2), ray.train.ScalingConfig(**scaling))  # type: ignore[arg-type]

    @pytest.mark.parametrize("resources", [{}, {"CPU": 0}, {"CPU": -1}, {"CPU": "1"}, {"CPU": True}, ["CPU"]])
    def test_resources_that_ray_cannot_reserve_are_refused(self, resources: object) -> None:
        with pytest.raises(ConfigError, match="resources_per_stage"):
            check_resources_per_stage(resources)


class TestFeasible:
    def test_the_error_names_needs_capacity_and_limit(self) -> None:
        cluster = Capacity(
            now=(Machines({"CPU": 2}), GPU_MACHINE),
            largest=(Machines({"CPU": 2}), Machines({"CPU": 4, "GPU": 2}, count=2)),
        )
        with pytest.raises(InfeasiblePlanError, match=r"needs 8 GPUs.*has 2 and can scale to 4.*resources_per_stage"):
            check_feasible(needs_of(Plan(data=2, pipeline=4), gpus=True), cluster)

    def test_the_error_says_so_where_nothing_scales_the_cluster(self) -> None:
        with pytest.raises(InfeasiblePlanError, match=r"needs 4 GPUs.*has 2 and has no autoscaler"):
            check_feasible(needs_of(Plan(data=2, pipeline=2), gpus=True), Capacity(now=(GPU_MACHINE,)))

    def test_what_the_cluster_can_scale_to_is_feasible(self) -> None:
        cluster = Capacity(now=(), largest=(Machines({"CPU": 4, "GPU": 2}, count=2),))
        needs = needs_of(Plan(data=2, pipeline=2), gpus=True)
        assert not is_feasible_now(needs, cluster)
        check_feasible(needs, cluster)

    def test_enough_in_all_but_too_little_on_each_machine(self) -> None:
        cluster = Capacity(now=(Machines({"CPU": 4}, count=3),))
        needs = needs_of(Plan(pipeline=2), None, {"CPU": 5}, gpus=False)
        with pytest.raises(InfeasiblePlanError, match=r"room for 2 times 5 CPUs.*hold 0 of them now"):
            check_feasible(needs, cluster)

    def test_a_machine_holds_whole_bundles_only(self) -> None:
        cluster = Capacity(now=(Machines({"CPU": 8}, count=2),))
        with pytest.raises(InfeasiblePlanError, match="hold 2 of them now"):
            check_feasible(needs_of(Plan(pipeline=3), None, {"CPU": 5}, gpus=False), cluster)

    def test_fractions_of_a_gpu_add_up(self) -> None:
        assert is_feasible_now(needs_of(Plan(pipeline=3), None, {"GPU": 0.1}, gpus=True), Capacity((GPU_MACHINE,)))
        assert Machines({"GPU": 0.3}).slots({"GPU": 0.1}) == 3

    def test_with_unknown_limits_only_the_autoscaler_refuses(self) -> None:
        check_feasible(needs_of(Plan(pipeline=8), gpus=True), Capacity(now=(GPU_MACHINE,), known=False))


class TestGrown:
    TYPES: ClassVar = {
        "head": {"resources": {"CPU": 2}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 2}, "max_workers": 3},
        "cpu": {"resources": {"CPU": 16}},
    }

    def test_the_limit_on_all_workers_goes_to_the_types_that_offer_most(self) -> None:
        config = {"max_workers": 4, "head_node_type": "head", "available_node_types": self.TYPES}
        for_gpus = Capacity((), grown(config, "GPU"))
        assert (for_gpus.can_have("GPU"), for_gpus.can_have("CPU")) == (6, 2 + 3 * 4 + 16)
        assert Capacity((), grown(config, "CPU")).can_have("CPU") == 2 + 4 * 16

    def test_without_limits_it_grows_for_ever(self) -> None:
        config = {"head_node_type": "head", "available_node_types": self.TYPES}
        assert Capacity((), grown(config, "CPU")).can_have("CPU") == float("inf")


class TestArrange:
    def test_the_drawing_in_the_docstring(self) -> None:
        assert arrange(list("ababab"), data=3, pipeline=2) == [[0, 2], [4, 5], [1, 3]]

    def test_on_one_machine_the_order_stays(self) -> None:
        assert arrange(["a"] * 6, data=2, pipeline=3) == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize("nodes", ["abcabc", "aaabbb", "abbbba", "aabbcc", "abcdef", "bacbca"])
    @pytest.mark.parametrize("pipeline", [2, 3])
    def test_each_bundle_is_used_once_and_first_stages_come_node_by_node(self, nodes: str, pipeline: int) -> None:
        data = len(nodes) // pipeline
        replicas = arrange(list(nodes), data, pipeline)
        assert sorted(bundle for replica in replicas for bundle in replica) == list(range(len(nodes)))
        assert [len(replica) for replica in replicas] == [pipeline] * data
        first = [nodes[replica[0]] for replica in replicas]
        # Ray Train numbers workers by the order in which their nodes come up first
        assert first == sorted(first, key=first.index)

    def test_whole_replicas_share_a_machine(self) -> None:
        nodes = list("abcabcabc")
        crossings = sum(nodes[a] != nodes[b] for a, b in _neighbours(arrange(nodes, data=3, pipeline=3)))
        assert crossings == 0


def _neighbours(replicas: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for replica in replicas for pair in itertools.pairwise(replica)]


class TestPins:
    def test_each_worker_goes_to_the_node_of_its_first_stage(self) -> None:
        pins = pins_of_workers(["a", "a", "b"], {"CPU": 1}, {"a": 2, "b": 1})
        assert pins == [{"ray.io/node-id": "a"}, {"ray.io/node-id": "a"}, {"ray.io/node-id": "b"}]

    def test_none_is_pinned_where_they_do_not_all_fit(self) -> None:
        assert pins_of_workers(["a", "a", "b"], {"CPU": 1}, {"a": 1, "b": 1}) is None
        assert pins_of_workers(["a"], {"CPU": 1}, {}) is None


def test_needs_without_a_pipeline_have_no_stages() -> None:
    needs = Needs(Plan(data=3), {}, {"CPU": 1.0})
    assert (needs.stages, needs.bundles, needs.bundle) == (0, 3, {"CPU": 1.0})
