"""The host loop: walks a schedule's tasks over the stages of all modules. The only file that dispatches work.

One Python thread hands each task to its devices and goes on; arrays are futures. The order is the schedule's and
nothing else's: it asks no device what is ready, so every process that runs it issues the same tasks in the same order.
Before a stage's task goes out, the one `IN_FLIGHT` before it is waited for: beyond about 32 the runtime blocks the host
thread, and every idle mesh would starve behind one busy mesh.
"""

import collections
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import optimizer
from hetjax.core.finish import Finish, Outcome, Reduced, Scores
from hetjax.core.layout import zigzag
from hetjax.core.packing import Prepared, prepare
from hetjax.core.schedule import build_schedule
from hetjax.core.tasks import HostTimes, Kind, StageKey, Task
from hetjax.core.train_spec import TrainSpec
from hetjax.core.wiring import Link, Tie, Wiring
from models.contract import ROUTED

IN_FLIGHT = 8
Tree = Any
Trees = dict[StageKey, Tree]
Microbatch = Mapping[str, np.ndarray]
Doing = Mapping[Kind, Callable[[Task], jax.Array | None]]  # gives what is ready when the task is through, or None


class Pipeline(Wiring):
    """The stages of a graph, what joins them, and the schedule by which they work."""

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__(spec)
        self.schedule = build_schedule(
            self.nodes,
            spec.num_microbatches,
            kind=spec.schedule,
            encoder_window=spec.encoder_window,
            ties=list(dict.fromkeys((tie.copy, tie.owner) for tie in self.ties if tie.gradient is not None)),
        )
        self._waiting: dict[StageKey, collections.deque] = {key: collections.deque() for key in self.stages}

    @functools.cached_property
    def finish(self) -> Finish:
        """The programs of the step's end."""
        return Finish(self)

    @functools.cached_property
    def flags(self) -> dict[StageKey, tuple[jax.Array, jax.Array]]:
        """False and True on each stage's devices: whether a microbatch is the step's first."""
        everywhere = {key: NamedSharding(stage.plan.mesh, P()) for key, stage in self.stages.items()}
        return {key: tuple(jax.device_put([np.False_, np.True_], where)) for key, where in everywhere.items()}

    def zeros(self) -> Trees:
        """Gradient accumulators of every stage that trains."""
        return {key: stage.parameters.zeros() for key, stage in self.stages.items() if stage.parameters.trains}

    def gradients(
        self, weights: Trees, microbatches: Sequence[Prepared], acc: Trees, count: float
    ) -> tuple[Reduced, list[Scores], HostTimes]:
        """Gradients of (sum of token losses) / `count` + mean of the microbatches' auxiliary losses, the scores of each
        microbatch, and where time went.

        `acc` is consumed. Returns before the devices are done.
        """
        step = _Gradients(self, weights, microbatches, dict(acc), count)
        host = self._walk(self.schedule.gradients, step.doing)
        return step.reduced(), [step.scores[i] for i in range(len(microbatches))], host

    def update(
        self,
        params: Trees,
        weights: Trees,
        states: Trees,
        reduced: Reduced,
        scores: list[Scores],
        *,
        count: float,
        learning_rate: float,
        host: HostTimes,
    ) -> tuple[Trees, Trees, Trees, Outcome]:
        """New (params, working weights, optimizer states) and the outcome. The first three arguments are consumed.

        `scores` are the microbatches', `count` the step's target tokens.
        """
        step = _Update(self.finish, dict(params), dict(weights), dict(states), reduced, scores, count, learning_rate)
        self._walk(self.schedule.update, step.doing)
        return step.params, step.weights, step.states, Outcome(**step.decided, host=host)

    def weights(self, params: Trees) -> Trees:
        """The working weights of these parameters."""
        found = {key: stage.weights(params[key]) for key, stage in self.stages.items()}
        for tie in self.ties:
            _lend(tie, found)
        return found

    def evaluate(self, weights: Mapping[StageKey, Tree], microbatch: Microbatch) -> tuple[jax.Array, np.ndarray]:
        """(sum of token losses, int32 [batch, seq]: the likeliest next id at every position)."""
        prepared = prepare(microbatch, self.packings)
        inputs: dict[StageKey, Tree] = collections.defaultdict(dict)
        for key, stage in self.stages.items():  # producers come before their consumers
            y = stage.programs["evaluate"](weights[key], inputs.pop(key, {}), self.place(key, prepared))
            crosses = {k: y[k] for k in stage.crosses}
            for link in self.links[key]:
                moved = link.boundary.forward(crosses)
                inputs[link.target] |= {name: moved[k] for k, name in link.names.items()}
        likeliest, cp = np.asarray(y["likeliest"]), self.graph.sink.layout.cp
        return y["loss"], likeliest if cp == 1 else likeliest[:, np.argsort(zigzag(likeliest.shape[1], cp))]

    def place(self, key: StageKey, microbatch: Prepared) -> list[jax.Array]:
        """What a stage reads, on its devices."""
        packed = zip(self.packings[key], microbatch.packed[key], strict=True)
        return [packing.place(words) for packing, words in packed]

    def _walk(self, tasks: Sequence[Task], doing: Doing) -> HostTimes:
        """Dispatches `tasks` in their order."""
        working = crossing = waiting = 0.0
        for task in tasks:
            start = time.perf_counter()
            queue = self._waiting[task.stage]
            if len(queue) == IN_FLIGHT:
                queue.popleft().block_until_ready()
            begun = time.perf_counter()
            done = doing[task.kind](task)
            if done is not None:
                queue.append(done)
            seconds = time.perf_counter() - begun
            waiting, working = waiting + begun - start, working + seconds
            crossing += seconds if task.kind is Kind.BOUNDARY else 0.0
        return HostTimes(len(tasks), working, crossing, waiting)


class _Gradients:
    """What is alive between the tasks that lead to a step's gradients."""

    def __init__(
        self, pipeline: Pipeline, weights: Trees, microbatches: Sequence[Prepared], acc: Trees, count: float
    ) -> None:
        self.pipeline, self.weights, self.microbatches, self.acc = pipeline, weights, microbatches, acc
        self.seeds = pipeline.finish.seeds(count)
        self.inputs: dict[tuple[StageKey, int], dict[str, jax.Array]] = collections.defaultdict(dict)
        self.kept: dict[tuple[StageKey, int], tuple] = {}
        self.cotangents: dict[tuple[StageKey, int], dict[str, jax.Array]] = {}
        self.leaving: dict[Task, tuple[Link, dict[str, jax.Array]]] = {}
        self.scores: dict[int, Scores] = collections.defaultdict(dict)
        self.grads = dict(acc)
        self.squares: dict[StageKey, jax.Array] = {}
        self.tied: list[jax.Array] = []  # squares of each tie, in their order
        self.doing: Doing = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BOUNDARY: self._boundary,
            Kind.REDUCE: self._reduce,
            Kind.MEASURE: self._measure,
            Kind.TIE: self._tie,
        }

    def reduced(self) -> Reduced:
        """The outcome."""
        stages = self.pipeline.finish.stages
        acc = {
            key: optimizer.merge(stage.parameters.repeated(self.acc[key]), self.grads[key])
            for key, stage in stages.items()
        }
        return Reduced(self.grads, acc, [*(self.squares[key] for key in stages), *self.tied])

    def _forward(self, task: Task) -> jax.Array:
        key, i = task.stage, task.microbatch
        stage = self.pipeline.stages[key]
        x = self.inputs.pop((key, i), {})
        packed = self.pipeline.place(key, self.microbatches[i])
        y, kept, done = stage.programs["forward"](self.weights[key], x, packed)
        if stage.has_backward:
            self.kept[key, i] = (x, packed, kept)
        if stage.scores and not stage.ends_in_loss:
            self.scores[i][key[0]] = {k: y[k] for k in stage.scores}
        for link in self.pipeline.links[key]:
            self.leaving[Task(Kind.BOUNDARY, key, i, link.target)] = link, {k: y[k] for k in stage.crosses}
        return done

    def _backward(self, task: Task) -> jax.Array:
        key, i = task.stage, task.microbatch
        g_x, acc, done = self.pipeline.stages[key].programs["backward"](
            self.weights[key],
            *self.kept.pop((key, i)),
            self.cotangents.pop((key, i), {}) | self.seeds.get(key, {}),
            self.acc.get(key, {}),
            self.pipeline.flags[key][i == 0],
        )
        if key in self.acc:
            self.acc[key] = acc
        if key == self.pipeline.last:
            self.scores[i][key[0]], done = done, done["loss"]
        for link in self.pipeline.sources[key]:
            if self.pipeline.stages[link.source].has_backward:
                g_y = {k: g_x[link.names[k]] for k in link.boundary.gradients}
                self.leaving[Task(Kind.BOUNDARY, key, i, link.source)] = link, g_y
        return done

    def _boundary(self, task: Task) -> None:
        link, arrays = self.leaving.pop(task)
        if task.to == link.target:
            moved = link.boundary.forward(arrays)
            self.inputs[link.target, task.microbatch] |= {name: moved[k] for k, name in link.names.items()}
        else:
            self.cotangents[link.source, task.microbatch] = link.boundary.backward(arrays)

    def _reduce(self, task: Task) -> None:
        key = task.stage
        reduced, self.squares[key] = self.pipeline.stages[key].programs["reduce"](self.acc[key])
        self.grads[key] = optimizer.merge(reduced, self.acc[key])

    def _measure(self, task: Task) -> None:
        key = task.stage
        self.grads[key] = self.acc[key]
        self.squares[key] = self.pipeline.stages[key].programs["measure"](self.acc[key])

    def _tie(self, task: Task) -> None:
        """The gradients of a copy's tied leaves, added to the owner's."""
        finish = self.pipeline.finish
        for tie in finish.ties:
            if (tie.copy, tie.owner) == (task.stage, task.to) and tie.gradient is not None:
                leaf = tie.gradient.forward({"x": _get(self.grads[tie.copy], tie.copy_path)})["x"]
                total, squares = finish.add[tie.owner](_get(self.grads[tie.owner], tie.owner_path), leaf)
                self.grads[tie.owner] = _set(self.grads[tie.owner], tie.owner_path, total)
                self.tied.append(squares)


class _Update:
    """What is alive between the tasks from a step's gradients to its new parameters."""

    def __init__(
        self,
        finish: Finish,
        params: Trees,
        weights: Trees,
        states: Trees,
        reduced: Reduced,
        scores: list[Scores],
        count: float,
        learning_rate: float,
    ) -> None:
        self.finish, self.reduced, self.scores = finish, reduced, scores
        self.params, self.weights, self.states = params, weights, states
        self.scalars = finish.scalars(count, learning_rate)
        self.decisions: dict[StageKey, jax.Array] = {}
        self.loads: dict[StageKey, jax.Array] = {}
        self.decided: dict[str, Any] = {}  # fields of the outcome
        self.doing: Doing = {Kind.DECIDE: self._decide, Kind.UPDATE: self._update, Kind.TIE: self._tie}

    def _decide(self, task: Task) -> None:
        """From squares and scores, which every device of a stage has, on one device; the decision to all."""
        finish = self.finish
        local = [x.addressable_data(0) for x in self.reduced.squares]
        scores = jax.tree.map(lambda x: x.addressable_data(0), self.scores)
        *squares, scalars, scores = jax.device_put([*local, self.scalars, scores], finish.home)
        found, decision = finish.decide(squares, scores, scalars)
        self.decided = {**found, "module_squares": finish.by_module(squares)}
        self.decisions = jax.device_put(dict.fromkeys(finish.moved, decision), finish.everywhere)
        loads = {key: found[ROUTED][key[0]] for key in finish.balanced}
        self.loads = jax.device_put(loads, {key: finish.everywhere[key] for key in loads})

    def _update(self, task: Task) -> None:
        key = task.stage
        stage, old = self.finish.moved[key], self.weights[key]
        given = self.params[key], self.states[key], stage.parameters.moving_of(old)
        loads = [self.loads[key]] if key in self.loads else []
        done = stage.programs["update"](*given, self.reduced.grads.get(key, {}), self.decisions[key], loads)
        self.params[key], self.states[key], moved = done
        self.weights[key] = stage.parameters.working.assemble(self.params[key], optimizer.merge(moved, old))

    def _tie(self, task: Task) -> None:
        """The new values of an owner's tied leaves, to the copy."""
        for tie in self.finish.ties:
            if (tie.owner, tie.copy) == (task.stage, task.to):
                _lend(tie, self.weights)


def _lend(tie: Tie, weights: Trees) -> None:
    """The owner's working weight to the copy."""
    value = tie.value.forward({"x": _get(weights[tie.owner], tie.owner_path)})["x"]
    weights[tie.copy] = _set(weights[tie.copy], tie.copy_path, value)


def _get(tree: Mapping, path: tuple[str, str]) -> jax.Array:
    return tree[path[0]][path[1]]


def _set(tree: Mapping, path: tuple[str, str], leaf: jax.Array) -> dict:
    return {**tree, path[0]: {**tree.get(path[0], {}), path[1]: leaf}}
