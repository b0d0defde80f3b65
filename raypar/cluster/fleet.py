"""The stage actors of one attempt: created in their bundles, connected, examined after a failure, stopped.

             actor 0        actor 1        actor 2
replica 0    rank 0 ──────▶ rank 1 ──────▶ rank 2        rank = replica · pipeline + actor
replica 1    rank 3 ──────▶ rank 4 ──────▶ rank 5        one torch.distributed world over all of them
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raypar.cluster import capacity
from raypar.cluster.placement import Needs, arrange, nodes_of_bundles, pins_of_workers, reserve
from raypar.errors import RayparError, RunError, StageDiedError, TimeoutExceededError
from raypar.observe.actor_info import ActorInfo
from raypar.observe.timeline import Event
from raypar.planning.plan import Plan, Timeouts
from raypar.workers.ray_errors import actor_name, death, stage_died, unwrapped
from raypar.workers.ray_private import free_resources_per_node

# Ray asks a machine for a sign of life every 3 s and gives it up after five without an answer. A living machine reports
# the death of a process at once.
_DEATH_IS_KNOWN_S = 30.0
_DEATH_ON_LIVING_MACHINE_S = 1.0


class Fleet:
    """The stage actors of all replicas.

    handles:         handles[replica][actor], for the train workers.
    infos:           each actor's description, in the same order.
    node_of_replica: the node of replica r's first actor, which reads worker r's batches from shared memory.
    worker_pins:     label selectors that put worker r on that node; None if there is no room for all of them.
    """

    def __init__(self, plan: Plan, timeouts: Timeouts) -> None:
        self._plan = plan
        self._timeouts = timeouts
        self._deadline = time.monotonic() + timeouts.start
        self._group: PlacementGroup | None = None
        self._starting: list[Any] = []
        self.handles: list[list[ActorHandle[Any]]] = []
        self.infos: list[list[ActorInfo]] = []
        self.node_of_replica: list[str] = []
        self.worker_pins: list[dict[str, str]] | None = None

    @classmethod
    def start(
        cls, actor_class: type, needs: Needs, timeouts: Timeouts, runtime_env: Mapping[str, Any] | None = None
    ) -> Fleet:
        """Place and connect all stage actors; after an error nothing is left of them.

        `actor_class` is a plain class like StageActor; `runtime_env` is that of the train workers, since the user's
        model runs in the stage actors as the user's loop runs in the workers.
        """
        fleet = cls(needs.plan, timeouts)
        try:
            fleet._create(actor_class, needs, dict(runtime_env or {}))
            fleet._connect()
        except BaseException:  # Ctrl-C too
            fleet.stop()
            raise
        return fleet

    def _create(self, actor_class: type, needs: Needs, runtime_env: dict[str, Any]) -> None:
        plan = self._plan
        self._group = reserve(needs, self._timeouts)
        nodes = nodes_of_bundles(self._group)
        bundles = arrange(nodes, plan.data, plan.pipeline)
        remote_class: Any = ray.remote(actor_class)
        for replica, of_replica in enumerate(bundles):
            # One by one, so that `stop` finds what has been created if this is interrupted.
            self.handles.append([])
            for actor, bundle in enumerate(of_replica):
                strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
                options = remote_class.options(
                    **_actor_options(needs.stage),
                    scheduling_strategy=strategy,
                    max_restarts=0,  # a restarted stage would have lost its weights; the whole attempt is repeated
                    runtime_env=runtime_env,
                )
                self.handles[-1].append(options.remote(replica, actor, plan, self._timeouts))
                self._starting.append(self.handles[-1][-1].describe.remote())
        described = self._get(self._starting, "describe")
        self._starting = []
        self.infos = [described[i : i + plan.pipeline] for i in range(0, len(described), plan.pipeline)]
        self.node_of_replica = [nodes[of_replica[0]] for of_replica in bundles]
        self.worker_pins = self._pins(needs, nodes)

    def _pins(self, needs: Needs, nodes: list[str]) -> list[dict[str, str]] | None:
        # What Ray reports as free may still include our bundles, which were placed a moment ago; a node's total less
        # our bundles has no such error. The smaller of both is safe.
        free = {node: amounts.get("CPU", 0.0) for node, amounts in free_resources_per_node().items()}
        total = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in capacity.live_nodes()}
        for node in set(nodes):
            ours = nodes.count(node) * needs.stage.get("CPU", 0.0)
            free[node] = min(free.get(node, 0.0), total.get(node, 0.0) - ours)
        return pins_of_workers(self.node_of_replica, needs.worker, free)

    def _connect(self) -> None:
        world = self._plan.world_size
        host, port = self._get([self.handles[0][0].open_store.remote(world)], "open_store")[0]
        calls = [
            handle.connect.remote(host, port, rank, world)
            for rank, handle in enumerate(handle for replica in self.handles for handle in replica)
        ]
        self._get(calls, "connect")

    def _get(self, calls: list[Any], method: str) -> list[Any]:
        """The answers of all actors, or of actor (0, 0) alone; an error names the actor that failed."""
        try:
            return ray.get(calls, timeout=max(self._deadline - time.monotonic(), 0.1))
        except GetTimeoutError:
            _, waiting = ray.wait(calls, num_returns=len(calls), timeout=0)
            infos = self._infos_by_rank()
            silent = "; ".join(actor_name(self._plan, calls.index(call), infos) for call in waiting)
            raise TimeoutExceededError(
                f"No answer to `{method}` from {silent} within {self._timeouts.start:g} s. A slow start (a runtime "
                "environment being installed, an image being pulled) needs a larger Timeouts(start=…); `ray list "
                "actors` shows what they wait for."
            ) from None
        except RayActorError as error:
            dead = self.autopsy()
            raise dead or RunError(f"A stage actor was lost while it started: {death(error)}") from None
        except RayTaskError as error:
            cause = unwrapped(error)
            if isinstance(cause, RayparError):
                raise cause from None
            raise RunError(f"A stage actor failed in `{method}`: {error}") from cause

    def autopsy(self, seconds: float = _DEATH_IS_KNOWN_S) -> StageDiedError | None:
        """Which stage actor is dead, if any; None if all answer or stay silent.

        A living actor answers, and a call to a dead one fails as soon as Ray knows of the death: after a moment for a
        process, after half a minute for a whole machine. So a silent actor is waited for that long, or for `seconds`;
        but only for a moment if its machine is alive, as this driver or the answer of another actor there shows: then
        the actor is stopped or busy.
        """
        if not self.handles:
            return None
        calls: list[Any] = [handle.describe.remote() for replica in self.handles for handle in replica]
        nodes = [str(info.node_id) for replica in self.infos for info in replica] or list(map(str, range(len(calls))))
        here = ray.get_runtime_context().get_node_id()
        deadline = time.monotonic() + seconds
        waiting = calls
        dead: dict[int, RayActorError] = {}
        while waiting and not dead:
            living = {here, *(node for node, call in zip(nodes, calls, strict=True) if call not in waiting)}
            if all(nodes[calls.index(call)] in living for call in waiting):
                deadline = min(deadline, time.monotonic() + _DEATH_ON_LIVING_MACHINE_S)
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            # Several may have died with their machine: look at all that are known by now.
            more, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.2) if waiting else ([], [])
            for call in [*done, *more]:
                try:
                    ray.get(call)
                except RayActorError as error:
                    dead[calls.index(call)] = error
                except RayTaskError:
                    pass  # it is alive; why it cannot describe itself does not matter here
        return stage_died(self._plan, dead, self._infos_by_rank()) if dead else None

    def _infos_by_rank(self) -> dict[int, ActorInfo]:
        return dict(enumerate(info for of_replica in self.infos for info in of_replica))

    def events(self) -> list[Event]:
        """What the actors did in the last steps of a traced run: those that answer within Timeouts(stop=…)."""
        calls: list[Any] = [handle.events.remote() for replica in self.handles for handle in replica]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=self._timeouts.stop)
        events: list[Event] = []
        for call in done:
            with contextlib.suppress(RayActorError, RayTaskError):
                events += ray.get(call)
        return events

    def stop(self) -> None:
        """Kill the actors and release their resources. May be called twice, and after a failed start."""
        if self._starting:
            # An actor that is killed while it starts logs pages of stack trace, so let it finish starting.
            with contextlib.suppress(Exception):
                ray.wait(self._starting, num_returns=len(self._starting), timeout=min(self._timeouts.stop, 10.0))
            self._starting = []
        for replica in self.handles:
            for handle in replica:
                with contextlib.suppress(Exception):  # dead already, or Ray itself is gone
                    ray.kill(handle)
        self.handles = []
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
            self._group = None


def _actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources in the form of an actor's options: three by name, the others in a dict."""
    named = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    options: dict[str, Any] = {option: resources.get(name, 0) for option, name in named.items()}
    options["resources"] = {name: amount for name, amount in resources.items() if name not in named.values()}
    return options
