"""The host loop: runs a schedule's tasks over the stages of all modules. The only file that dispatches work to devices.

One Python thread hands each task to its devices and goes on; arrays are futures. Tasks of one device group keep the
schedule's order. At most `IN_FLIGHT` tasks of a stage wait on its devices: beyond about 32 the runtime blocks the host
thread, and every idle mesh would starve behind one busy mesh.
"""

import collections
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.boundary import Boundary
from hetjax.core.graph import Module
from hetjax.core.layout import StagePlan, plan_stages, sharding, zigzag
from hetjax.core.parameters import Parameters
from hetjax.core.schedule import Kind, Schedule, StageNode, Task, build_schedule, dependencies
from hetjax.core.stage import Stage
from hetjax.core.train_spec import TrainSpec

IN_FLIGHT = 8
StageKey = tuple[str, int]
Tree = Any
Microbatch = Mapping[str, np.ndarray]


class HostTimes(NamedTuple):
    """Where the host thread's time went in one pass over the schedule."""

    tasks: int
    dispatch_seconds: float  # in forward and backward tasks, their boundaries included
    boundary_seconds: float
    wait_seconds: float  # for a stage that had `IN_FLIGHT` tasks waiting


class Gradients(NamedTuple):
    """What the loop leaves for the end of the step: accumulators per stage, and the loss sum of each microbatch."""

    acc: dict[StageKey, Tree]
    losses: list[jax.Array]
    host: HostTimes


class Link(NamedTuple):
    """An edge between two stages: where `source`'s output keys enter `target`'s inputs."""

    source: StageKey
    target: StageKey
    names: dict[str, str]  # output key -> input key
    boundary: Boundary


class Pipeline:
    """All stages of a graph, the boundaries between them and the schedule, built for one microbatch shape.

    Nothing is compiled or placed yet.
    """

    def __init__(self, spec: TrainSpec) -> None:
        graph = spec.graph
        self.spec, self.graph = spec, graph
        self.plans = {m.name: plan_stages(m.name, m.definition, m.layout, spec.devices) for m in graph.modules}
        self.stages: dict[StageKey, Stage] = {}
        self.links: dict[StageKey, list[Link]] = {}  # by source
        self.sources: dict[StageKey, list[Link]] = {}  # by target
        for module in (*graph.encoders, graph.sink):
            for plan in self.plans[module.name]:
                key = (module.name, plan.index)
                self.links[key], self.sources[key] = [], self._links_into(module, plan)
                for link in self.sources[key]:
                    self.links[link.source].append(link)
                self.stages[key] = Stage(
                    module,
                    plan,
                    Parameters(module, plan, spec.optimizer, seed=spec.seed, dtype=spec.param_dtype),
                    is_sink=module is graph.sink,
                    x={n: link.boundary.destination[k] for link in self.sources[key] for k, n in link.names.items()},
                    x_wanted=frozenset(
                        n
                        for link in self.sources[key]
                        if self.stages[link.source].has_backward
                        for n in link.names.values()
                    ),
                    batch=spec.batch,
                )
        self.last: StageKey = (graph.sink.name, graph.sink.layout.pp - 1)
        nodes = [self._node(key) for key in self.stages]
        self.schedule: Schedule = build_schedule(
            nodes, spec.num_microbatches, kind=spec.schedule, encoder_window=spec.encoder_window
        )
        self.needs = {task: tuple(dependencies(task, nodes)) for task in self.schedule.order}
        seq = spec.batch["tokens"].shape[1]
        self._orders = {m.name: zigzag(seq, m.layout.cp) for m in graph.modules if m.layout.cp > 1}

    def _links_into(self, module: Module, plan: StagePlan) -> list[Link]:
        target = (module.name, plan.index)
        if plan.index > 0:
            source, dims = (module.name, plan.index - 1), module.definition.carry
            y = self.stages[source].y
            return [Link(source, target, {k: k for k in y}, Boundary(y, {k: sharding(plan.mesh, dims[k]) for k in y}))]
        links = []
        for edge in self.graph.edges:
            if edge.consumer == module.name:
                source = (edge.producer, len(self.plans[edge.producer]) - 1)
                y = self.stages[source].y
                names = {k: edge.producer if k == "x" else f"{edge.producer}.{k}" for k in y}
                where = {k: sharding(plan.mesh, ("items", *(None,) * (y[k].ndim - 1))) for k in y}
                links.append(Link(source, target, names, Boundary(y, where)))
        return links

    def _node(self, key: StageKey) -> StageNode:
        stage = self.stages[key]
        upstream = tuple(link.source for link in self.sources[key])
        return StageNode(key[0], key[1], frozenset(stage.plan.device_ids), stage.has_backward, upstream)

    @functools.cached_property
    def flags(self) -> dict[StageKey, tuple[jax.Array, jax.Array]]:
        """False and True on each stage's devices: whether a microbatch is the step's first."""
        everywhere = {key: NamedSharding(stage.plan.mesh, P()) for key, stage in self.stages.items()}
        return {key: tuple(jax.device_put([np.False_, np.True_], where)) for key, where in everywhere.items()}

    @property
    def boundaries(self) -> dict[str, Boundary]:
        """Every boundary, by "vision/0 -> llm/0"."""
        links = [link for links in self.links.values() for link in links]
        return {f"{a}/{i} -> {b}/{j}": boundary for (a, i), (b, j), _, boundary in links}

    def thunks(self, *, evaluate: bool) -> list[tuple[str, Callable[[], object]]]:
        """(name, function that compiles it) of every program of the loop."""
        found: list[tuple[str, Callable[[], object]]] = []
        for (module, index), stage in self.stages.items():
            found += [(f"{module}/{index} {name}", thunk) for name, thunk in stage.thunks(evaluate=evaluate).items()]
        for name, boundary in self.boundaries.items():
            found += [(f"{name} {program}", thunk) for program, thunk in boundary.programs()]
        return found

    def zeros(self) -> dict[StageKey, Tree]:
        """Gradient accumulators of every stage that trains."""
        return {key: stage.parameters.zeros() for key, stage in self.stages.items() if stage.parameters.trains}

    def run(
        self,
        params: Mapping[StageKey, Tree],
        microbatches: Sequence[Microbatch],
        acc: dict[StageKey, Tree],
        count: float,
    ) -> Gradients:
        """Forward and backward of every microbatch. Gradients are those of (sum of token losses) / `count`.

        `acc` is consumed. Returns before the devices are done.
        """
        return _Loop(self, params, microbatches, dict(acc), count).run()

    def evaluate(self, params: Mapping[StageKey, Tree], microbatch: Microbatch) -> tuple[jax.Array, np.ndarray]:
        """(sum of token losses, int32 [batch, seq]: the likeliest next id at every position)."""
        inputs: dict[StageKey, Tree] = collections.defaultdict(dict)
        for key, stage in self.stages.items():  # producers come before their consumers
            y = stage.programs["evaluate"](params[key], inputs.pop(key, {}), self.place(key, microbatch))
            for link in self.links[key]:
                moved = link.boundary.forward(y)
                inputs[link.target] |= {name: moved[k] for k, name in link.names.items()}
        likeliest = np.asarray(y["likeliest"])
        order = self._orders.get(self.graph.sink.name)
        return y["loss"], likeliest if order is None else likeliest[:, np.argsort(order)]

    def place(self, key: StageKey, microbatch: Microbatch) -> dict[str, jax.Array]:
        """The arrays that a stage reads, on its devices; in zig-zag order where the stage's cp splits a sequence."""
        stage, order = self.stages[key], self._orders.get(key[0])
        reads = stage.module.definition.reads
        arrays = [
            np.take(microbatch[n], order, reads[n].index("seq"))
            if order is not None and "seq" in reads[n]
            else microbatch[n]
            for n in stage.batch
        ]
        return dict(zip(stage.batch, jax.device_put(arrays, [a.sharding for a in stage.batch.values()]), strict=True))


class _Loop:
    """One pass over the schedule: what is alive between tasks."""

    def __init__(
        self,
        pipeline: Pipeline,
        params: Mapping[StageKey, Tree],
        microbatches: Sequence[Microbatch],
        acc: dict[StageKey, Tree],
        count: float,
    ) -> None:
        self.pipeline, self.params, self.microbatches, self.acc = pipeline, params, microbatches, acc
        loss = pipeline.stages[pipeline.last].ends["loss"]
        self.seed = jax.device_put(np.asarray(1.0 / max(count, 1.0), loss.dtype), loss.sharding)
        self.inputs: dict[tuple[StageKey, int], dict[str, jax.Array]] = collections.defaultdict(dict)
        self.kept: dict[tuple[StageKey, int], tuple] = {}
        self.cotangents: dict[tuple[StageKey, int], dict[str, jax.Array]] = {}
        self.losses: dict[int, jax.Array] = {}
        self.waiting: dict[StageKey, collections.deque] = {key: collections.deque() for key in pipeline.stages}
        self.boundary_seconds = 0.0

    def run(self) -> Gradients:
        """Every task, in an order that the schedule's groups and the tasks' needs allow."""
        done: set[Task] = set()
        heads = [collections.deque(group) for group in self.pipeline.schedule.groups]
        dispatch_seconds = wait_seconds = 0.0
        while any(heads):
            ready = [q for q in heads if q and all(t in done for t in self.pipeline.needs[q[0]])]
            assert ready, "the schedule has a circular wait"
            free = [q for q in ready if self._has_room(q[0].key)]
            start = time.perf_counter()
            if not free:  # every ready stage is full: wait for the oldest task of the first
                self.waiting[ready[0][0].key].popleft().block_until_ready()
                wait_seconds += time.perf_counter() - start
                continue
            for queue in free:
                task = queue.popleft()
                (self._forward if task.kind is Kind.FORWARD else self._backward)(task.key, task.microbatch)
                done.add(task)
            dispatch_seconds += time.perf_counter() - start
        host = HostTimes(len(done), dispatch_seconds, self.boundary_seconds, wait_seconds)
        return Gradients(self.acc, [self.losses[i] for i in range(len(self.microbatches))], host)

    def _has_room(self, key: StageKey) -> bool:
        queue = self.waiting[key]
        while queue and queue[0].is_ready():
            queue.popleft()
        return len(queue) < IN_FLIGHT

    def _forward(self, key: StageKey, i: int) -> None:
        stage = self.pipeline.stages[key]
        x = self.inputs.pop((key, i), {})
        batch = self.pipeline.place(key, self.microbatches[i])
        y, kept = stage.programs["forward"](self.params[key], x, batch)
        if stage.has_backward:
            self.kept[key, i] = (x, batch, kept)
        self.waiting[key].append(jax.tree.leaves((y, kept))[0])
        if key == self.pipeline.last:
            self.cotangents[key, i] = {"loss": self.seed}
        start = time.perf_counter()
        for link in self.pipeline.links[key]:
            moved = link.boundary.forward(y)
            self.inputs[link.target, i] |= {name: moved[k] for k, name in link.names.items()}
        self.boundary_seconds += time.perf_counter() - start

    def _backward(self, key: StageKey, i: int) -> None:
        stage = self.pipeline.stages[key]
        g = self.cotangents.pop((key, i))
        g_x, acc, finished = stage.programs["backward"](
            self.params[key], *self.kept.pop((key, i)), g, self.acc.get(key, {}), self.pipeline.flags[key][i == 0]
        )
        if key in self.acc:
            self.acc[key] = acc
        self.waiting[key].append(finished)
        if key == self.pipeline.last:
            self.losses[i] = finished
        start = time.perf_counter()
        for link in self.pipeline.sources[key]:
            if self.pipeline.stages[link.source].has_backward:
                g_y = link.boundary.backward({k: g_x[link.names[k]] for k in link.boundary.gradients})
                self.cotangents[link.source, i] = g_y
        self.boundary_seconds += time.perf_counter() - start
