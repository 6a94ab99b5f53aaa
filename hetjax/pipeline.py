"""The host loop: runs a schedule's tasks over the stages of all modules. The only file that dispatches work to devices.

One Python thread hands each task to its devices and goes on; arrays are futures. Tasks of one device group keep the
schedule's order. At most `IN_FLIGHT` tasks of a stage wait on its devices: beyond about 32 the runtime blocks the host
thread, and every idle mesh would starve behind one busy mesh.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetjax.boundary import Boundary
from hetjax.graph import Graph
from hetjax.layout import plan_stages, sharding, zigzag
from hetjax.optimizer import OptimizerConfig
from hetjax.schedule import Kind, Schedule, StageNode, Task, build_schedule, dependencies
from hetjax.stage import Stage

IN_FLIGHT = 8
StageKey = tuple[str, int]
Tree = Any
Microbatch = Mapping[str, np.ndarray]


class Gradients(NamedTuple):
    """What the loop leaves for the end of the step: accumulators per stage, and the loss sum of each microbatch."""

    acc: dict[StageKey, Tree]
    losses: list[jax.Array]


class Link(NamedTuple):
    """An edge between two stages: where `source`'s output keys enter `target`'s inputs."""

    source: StageKey
    target: StageKey
    names: dict[str, str]  # output key -> input key
    boundary: Boundary


class Pipeline:
    """All stages of a graph, the boundaries between them and the schedule, built for one microbatch shape.

    `batch`: abstract global microbatch (shape and dtype of each array). Nothing is compiled or placed before `compile`.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        devices: Sequence[jax.Device],
        batch: Mapping[str, jax.ShapeDtypeStruct],
        num_microbatches: int,
        optimizer: OptimizerConfig,
        schedule: str = "1f1b",
        encoder_window: int | None = None,
        seed: int = 0,
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.graph, self.num_microbatches, self.param_dtype = graph, num_microbatches, param_dtype
        self.optimizer = optimizer
        self.stages: dict[StageKey, Stage] = {}
        self.links: dict[StageKey, list[Link]] = {}  # by source: forward edges
        self.sources: dict[StageKey, list[Link]] = {}  # by target
        for module in (*graph.encoders, graph.sink):
            for plan in plan_stages(module.name, module.definition, module.layout, devices):
                key = (module.name, plan.index)
                links = self._links_into(graph, module, plan)
                x = {n: _placed(link, k) for link in links for k, n in link.names.items()}
                wanted = frozenset(n for link in links if self.stages[link.source].has_backward for n in link.names.values())
                self.stages[key] = Stage(
                    module, plan, optimizer, is_sink=module is graph.sink, x=x, x_wanted=wanted,
                    batch=batch, seed=seed, param_dtype=param_dtype,
                )
                self.sources[key] = links
                self.links[key] = []
                for link in links:
                    self.links[link.source].append(link)
        self.last: StageKey = (graph.sink.name, graph.sink.layout.pp - 1)
        nodes = [self._node(key) for key in self.stages]
        self.schedule: Schedule = build_schedule(nodes, num_microbatches, kind=schedule, encoder_window=encoder_window)
        self._needs = {task: tuple(dependencies(task, nodes)) for task in self.schedule.order}
        self._orders = {
            m.name: zigzag(batch["tokens"].shape[1], m.layout.cp) if m.layout.cp > 1 else None for m in graph.modules
        }

    def _links_into(self, graph: Graph, module: Any, plan: Any) -> list[Link]:
        target = (module.name, plan.index)
        if plan.index > 0:
            source, dims = (module.name, plan.index - 1), module.definition.carry
            y = self.stages[source].shapes.y
            return [Link(source, target, {k: k for k in y}, Boundary(y, {k: sharding(plan.mesh, dims[k]) for k in y}))]
        links = []
        for edge in graph.edges:
            if edge.consumer == module.name:
                source = max(k for k in self.stages if k[0] == edge.producer)
                y = self.stages[source].shapes.y
                names = {k: edge.producer if k == "x" else f"{edge.producer}.{k}" for k in y}
                where = {k: sharding(plan.mesh, ("items", *(None,) * (y[k].ndim - 1))) for k in y}
                links.append(Link(source, target, names, Boundary(y, where)))
        return links

    def _node(self, key: StageKey) -> StageNode:
        stage = self.stages[key]
        upstream = tuple(link.source for link in self.sources[key])
        return StageNode(key[0], key[1], frozenset(stage.plan.device_ids), stage.has_backward, upstream)

    def programs(self) -> list[tuple[str, Any]]:
        """(name, thunk) of every program of the loop; each thunk compiles one."""
        found = [(f"{m}/{i} {n}", thunk) for (m, i), s in self.stages.items() for n, thunk in s.compile().items()]
        for links in self.links.values():
            for link in links:
                name = f"{link.source[0]}/{link.source[1]} -> {link.target[0]}/{link.target[1]}"
                found += [(f"{name} {n}", thunk) for n, thunk in link.boundary.programs()]
        return found

    def zeros(self) -> dict[StageKey, Tree]:
        """Empty gradient accumulators of every stage that trains."""
        return {k: s.zeros() for k, s in self.stages.items() if jax.tree.leaves(s.trainable)}

    def run(self, params: Mapping[StageKey, Tree], microbatches: Sequence[Microbatch], acc: dict[StageKey, Tree], count: float) -> Gradients:
        """Forward and backward of every microbatch. Gradients are those of (sum of token losses) / `count`.

        `acc` is consumed. Returns before the devices are done.
        """
        return _Loop(self, params, microbatches, dict(acc), count).run()

    def place(self, key: StageKey, microbatch: Microbatch) -> dict[str, jax.Array]:
        """The arrays that a stage reads, on its devices; sequences in zig-zag order where the stage's cp splits them."""
        stage = self.stages[key]
        order, reads = self._orders[key[0]], stage.module.definition.reads
        names = list(stage.shapes.batch)
        arrays = [microbatch[n] for n in names]
        if order is not None:
            arrays = [np.take(a, order, reads[n].index("seq")) if "seq" in reads[n] else a for a, n in zip(arrays, names, strict=True)]
        return dict(zip(names, jax.device_put(arrays, [stage.shapes.batch[n].sharding for n in names]), strict=True))


def _placed(link: Link, key: str) -> jax.ShapeDtypeStruct:
    y = link.boundary.destination[key]
    shape = link.boundary.source[key]
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=y)


class _Loop:
    """One pass over the schedule: what is alive between tasks."""

    def __init__(self, pipeline: Pipeline, params: Mapping[StageKey, Tree], microbatches: Sequence[Microbatch], acc: dict, count: float) -> None:
        self.pipeline, self.params, self.microbatches, self.acc = pipeline, params, microbatches, acc
        last = pipeline.stages[pipeline.last]
        loss = last.shapes.y["loss"]
        self.seed = jax.device_put(np.asarray(1.0 / max(count, 1.0), loss.dtype), loss.sharding)
        self.inputs: dict[tuple[StageKey, int], dict[str, jax.Array]] = collections.defaultdict(dict)
        self.kept: dict[tuple[StageKey, int], tuple] = {}
        self.cotangents: dict[tuple[StageKey, int], dict[str, jax.Array]] = {}
        self.losses: dict[int, jax.Array] = {}
        self.waiting: dict[StageKey, collections.deque] = {k: collections.deque() for k in pipeline.stages}

    def run(self) -> Gradients:
        done: set[Task] = set()
        heads = [collections.deque(group) for group in self.pipeline.schedule.groups]
        while any(heads):
            ready = [q for q in heads if q and all(t in done for t in self.pipeline._needs[q[0]])]
            assert ready, "the schedule has a circular wait"
            free = [q for q in ready if self._has_room((q[0].module, q[0].stage))]
            if not free:  # every ready stage is full: wait for the oldest task of the first
                self.waiting[(ready[0][0].module, ready[0][0].stage)].popleft().block_until_ready()
                continue
            for queue in free:
                task = queue.popleft()
                self._dispatch(task)
                done.add(task)
        return Gradients(self.acc, [self.losses[i] for i in range(len(self.microbatches))])

    def _has_room(self, key: StageKey) -> bool:
        queue = self.waiting[key]
        while queue and queue[0].is_ready():
            queue.popleft()
        return len(queue) < IN_FLIGHT

    def _dispatch(self, task: Task) -> None:
        key = (task.module, task.stage)
        (self._forward if task.kind is Kind.FORWARD else self._backward)(key, task.microbatch)

    def _forward(self, key: StageKey, i: int) -> None:
        stage = self.pipeline.stages[key]
        x = self.inputs.pop((key, i), {})
        batch = self.pipeline.place(key, self.microbatches[i])
        y, kept = stage.forward(self.params[key], x, batch)
        if stage.has_backward:
            self.kept[key, i] = (x, batch, kept)
        self.waiting[key].append(next(iter(y.values())))
        if key == self.pipeline.last:
            self.losses[i] = y["loss"]
            self.cotangents[key, i] = {"loss": self.seed}
        for link in self.pipeline.links[key]:
            moved = link.boundary.forward(y)
            self.inputs[link.target, i] |= {name: moved[k] for k, name in link.names.items()}

    def _backward(self, key: StageKey, i: int) -> None:
        stage = self.pipeline.stages[key]
        g = self.cotangents.pop((key, i))
        x, batch, kept = self.kept.pop((key, i))
        g_x, acc, finished = stage.backward(self.params[key], x, batch, kept, g, self.acc.get(key, {}))
        if key in self.acc:
            self.acc[key] = acc
        self.waiting[key].append(finished)
        for link in self.pipeline.sources[key]:
            if self.pipeline.stages[link.source].has_backward:
                self.cotangents[link.source, i] = link.boundary.backward({k: g_x[name] for k, name in link.names.items()})


