"""The engine: what one actor does in a step.

    gather ─▶ passes of its stages ─▶ gradients of ties ─▶ gradients of replicas ─▶ commit ─▶ average, spread ties
              (raypar.engine.passes)

The commit is one sum over all actors of all replicas (StepTotals). When it ends, every stage of every replica has
finished its backward passes, all actors know the same numbers, and all decide alike: step the optimizer, skip the step,
or drop it as if it had never run.

An engine's calls are generators that yield what they wait for (see raypar.transport.interface).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from raypar.engine import microbatch
from raypar.engine.clock import Clock
from raypar.engine.faults import failed_wait, user_code
from raypar.engine.passes import Mode, Passes, Run, Setup
from raypar.engine.step import StepRequest, StepResult, StepTotals, non_finite, sum_scalars
from raypar.planning.place import Place
from raypar.replicas.ties import Ties
from raypar.transport.interface import Waiting


class Engine:
    """One actor of one replica: its stages, its connections, its optimizer."""

    def __init__(self, setup: Setup) -> None:
        self.plan, self.replica, self.actor, self.device = setup.plan, setup.replica, setup.actor, setup.device
        self.part, self.learner, self.sync, self.transport = setup.part, setup.learner, setup.sync, setup.transport
        self.clock = Clock(setup.device, trace=setup.trace)
        self.passes = Passes(setup, self.clock)
        self.ties = Ties(setup.part, setup.transport)
        self.everyone = setup.transport.everyone()
        self._place = Place(self.replica, tuple(self.part.stages))
        self._forms: dict[Hashable, int] = {}

    # ------------------------------------------------------------ the calls of a replica

    def train_step(self, request: StepRequest) -> Waiting:
        """One optimizer step; returns a StepResult. Raises NonFiniteError if the loss or the gradient is not finite;
        then nothing has changed."""
        self.learner.begin()
        self.clock.begin_step(request.step)
        run = self._run_of(Mode.TRAIN, request)
        self._gather(run)
        yield from self.passes.play(run)
        self.clock.end_step()
        yield from self._reduce(run)
        totals = yield from self._totals(run, request)
        lr, norm, skipped = yield from self._commit(request, totals)
        averaged = yield from self._average(request, totals)
        if averaged or not skipped:
            with self._waiting_for("the new values of tied weights"):
                yield from self.ties.spread_weights()
        return StepResult(request.step, totals.mean, norm, totals.samples, lr, skipped)

    def eval_step(self, request: StepRequest) -> Waiting:
        """Forward passes only; returns the loss's (sum, weight) over this replica's rows on the actor of the last
        stage, (0, 0) on other actors."""
        run = yield from self._evaluate(Mode.EVAL, request)
        return tuple(sum_scalars([pair[index] for pair in run.losses]) for index in (0, 1))

    def predict(self, request: StepRequest) -> Waiting:
        """Forward passes only; returns the model's output on the actor of the last stage, None on other actors."""
        run = yield from self._evaluate(Mode.PREDICT, request)
        return microbatch.join(run.outputs) if run.outputs else None

    # ------------------------------------------------------------ passes, and what surrounds them

    def _run_of(self, mode: Mode, request: StepRequest) -> Run:
        self.learner.set_mode(mode.code == "train")
        sizes = microbatch.sizes(request.batch.rows, self.plan.microbatch_count)
        if mode is Mode.PREDICT and not sizes:  # the output for no row has a shape, too
            sizes = [0]
        inputs, targets = request.batch.cut(sizes, self.device)
        form = self._forms.setdefault(request.batch.form, len(self._forms))
        return Run(mode, request.step, sizes, form, inputs, targets)

    def _evaluate(self, mode: Mode, request: StepRequest) -> Waiting:
        """Forward passes only; returns their Run."""
        run = self._run_of(mode, request)
        if mode is Mode.SEARCH:
            run.finite = [True] * len(self.plan.actor_of_stage)
        self._gather(run)
        yield from self.passes.play(run)
        self.sync.end()
        return run

    def _gather(self, run: Run) -> None:
        if self.sync.gathers:
            traced = self.clock.traced("gather", self.part.first_stage) if run.mode.trains else nullcontext()
            with self._waiting_for("gathering the weights from all replicas"), traced:
                self.sync.begin(trains=run.mode.trains)

    def _reduce(self, run: Run) -> Waiting:
        """Sum gradients: first those of tied weights within the replica, then all of them over the replicas."""
        with self._waiting_for("the gradients of tied weights"):
            yield from self.ties.add_gradients()
        for stage in self.part.stages:
            adding = self._waiting_for("adding up the gradients over all replicas", stage)
            with adding, self.clock.traced("reduce", stage):
                yield from self.sync.reduce(stage, run.count)

    # ------------------------------------------------------------ the commit and what can go wrong

    def _totals(self, run: Run, request: StepRequest) -> Waiting:
        """The commit: returns the StepTotals, the same on all actors."""
        loss, weight = (sum_scalars([pair[index] for pair in run.losses]) for index in (0, 1))
        samples = request.batch.rows if self.plan.actor_of_stage[-1] == self.actor else 0
        separate = self.plan.data if self.sync.trains_separately else 0
        squared = self.learner.squared_norm(shards_only=self.replica > 0 and not separate)
        share = StepTotals.share(loss, weight, squared, samples, self.replica, separate)
        with self.clock.traced("commit", self.part.first_stage):
            return StepTotals.from_sum((yield from self._sum_over_all(share)))

    def _sum_over_all(self, numbers: list[float]) -> Waiting:
        if self.everyone is None:
            return numbers
        vector = torch.tensor(numbers, dtype=torch.float64)
        with self._waiting_for("the commit"):
            yield self.everyone.sum(vector)
        return vector.tolist()

    def _commit(self, request: StepRequest, totals: StepTotals) -> Waiting:
        """Step the optimizer, skip the step if no row had a weight, or drop it if it is not finite. Returns the
        learning rate (None without an optimizer), the norm of the gradient, and whether the step was skipped."""
        if not totals.are_finite:
            yield from self._drop_step(request, totals.loss)
            return None, math.inf, True
        with self._user_code("the optimizer's step"):
            lr, norm = self.learner.commit(*totals.of(self.replica), others_trained=bool(totals.weight))
        return lr, norm, not totals.weight

    def _average(self, request: StepRequest, totals: StepTotals) -> Waiting:
        """Average the weights of replicas that train separately, if an average is due; returns whether it was."""
        if totals.are_finite:
            self.sync.count([weight for weight, _ in totals.of_replica])
        if not self.sync.is_due(request.step, is_last=request.is_last):
            return False
        averaging = self._waiting_for("averaging the weights of all replicas")
        with averaging, self.clock.traced("reduce", self.part.first_stage):
            means = yield from self.sync.average()
        with self._user_code("the outer optimizer's step"):
            self.sync.take(means)
        return True

    def _drop_step(self, request: StepRequest, loss: float) -> Waiting:
        """Drop a step whose loss or gradient is not finite, on all actors alike. Raises NonFiniteError, unless a
        smaller loss scale may help: then the scale shrinks, and the step counts as skipped."""
        self.learner.drop_step()
        for stage in self.part.stages.values():
            stage.drop_step()
        # The loss is summed before it is scaled: if it is not finite itself, no smaller scale would help.
        scale = self.learner.loss_scale if math.isfinite(loss) else None
        if scale is None or not scale.shrink():
            yield from self._find_non_finite(request, loss)

    def _find_non_finite(self, request: StepRequest, loss: float) -> Waiting:
        """Repeat the forward passes of the failed step to find the first stage whose output is not finite; raises
        NonFiniteError."""
        run = yield from self._evaluate(Mode.SEARCH, request)
        in_batch = not microbatch.is_finite([run.inputs, run.targets])
        self.learner.drop_step()
        counts = yield from self._sum_over_all([float(in_batch), *(float(not finite) for finite in run.finite)])
        first = next((stage for stage, count in enumerate(counts[1:]) if count), None)
        raise non_finite(request.step, loss, bool(counts[0]), first, self.plan.precision)

    # ------------------------------------------------------------ addresses for errors

    @contextmanager
    def _waiting_for(self, operation: str, stage: int | None = None) -> Iterator[None]:
        """Add replica and stage to an error raised while waiting for other actors."""
        try:
            yield
        except RuntimeError as error:
            stage = self.part.first_stage if stage is None else stage
            raise failed_wait(Place(self.replica, (stage,)), operation, error) from error

    def _user_code(self, operation: str) -> AbstractContextManager[None]:
        return user_code(self._place, operation)
