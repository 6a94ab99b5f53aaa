"""The stages of a graph and the boundaries between them, built for one microbatch shape; nothing is compiled yet."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from hetjax.core import processes
from hetjax.core.boundary import Boundary
from hetjax.core.graph import Module
from hetjax.core.packing import Packing, Prepared
from hetjax.core.parameters import Parameters
from hetjax.core.plan import StagePlan, plan_stages
from hetjax.core.stage import Stage
from hetjax.core.tasks import OFFLOADS, ZERO_BUBBLE, Kind, StageKey, StageNode, Task
from hetjax.core.train_spec import TrainSpec
from models.paths import Path, at, flat

Tree = Any


class Link(NamedTuple):
    """An edge between two stages: where `source`'s output keys enter `target`'s inputs."""

    source: StageKey
    target: StageKey
    names: dict[str, str]  # output key -> input key, of what the target takes
    boundary: Boundary

    @property
    def name(self) -> str:
        """Such as "vision/0 -> llm/0"."""
        return " -> ".join(f"{module}/{number}" for module, number in (self.source, self.target))

    def forward(self, y: Tree | None) -> dict[str, jax.Array]:
        """What the target takes of the source's outputs, as its inputs; None: these are another process's."""
        moved = self.boundary.forward(None if y is None else {k: y[k] for k in self.names})
        return {name: moved[k] for k, name in self.names.items()}


class Sharing(NamedTuple):
    """Leaves that go from a tree of one stage to one of another."""

    paths: dict[str, tuple[Path, Path]]  # by name: where each comes from, and where it goes to
    boundary: Boundary

    def forward(self, tree: Tree | None) -> dict[Path, jax.Array]:
        """The leaves by their new paths; None: the tree is another process's."""
        given = None if tree is None else {name: at(tree, source) for name, (source, _) in self.paths.items()}
        moved = self.boundary.forward(given)
        return {path: moved[name] for name, (_, path) in self.paths.items()}


class Tie(NamedTuple):
    """Leaves held by two stages: the owner's, and copies in the module's last stage, or in a replica of the owner."""

    owner: StageKey
    copy: StageKey
    gradients: Sharing | None  # copy -> owner; None: the leaves are frozen
    values: Sharing  # owner -> copy, of the working weights


class Wiring:
    """All stages, producers before their consumers, and what joins them."""

    def __init__(self, spec: TrainSpec) -> None:
        graph = spec.graph
        self.spec, self.graph = spec, graph
        self.plans = {m.name: plan_stages(m.name, m.definition, m.layout, spec.devices) for m in graph.modules}
        self.stages: dict[StageKey, Stage] = {}
        self.links: dict[StageKey, list[Link]] = {}  # by source
        self.sources: dict[StageKey, list[Link]] = {}  # by target
        for module in (*graph.encoders, graph.sink):
            for plan in self.plans[module.name]:
                self._add(module, plan)
        self.mine = frozenset(k for k, s in self.stages.items() if processes.owns_some(s.plan.mesh.devices.flat))
        self.last: StageKey = (graph.sink.name, graph.sink.layout.num_stages - 1)
        self.ties = [tie for key in self.stages for tie in self._ties_of(key)]
        self.packings: dict[StageKey, tuple[Packing, ...]] = {key: s.packings for key, s in self.stages_here.items()}

    def _add(self, module: Module, plan: StagePlan) -> None:
        key, spec = plan.key, self.spec
        self.links[key], self.sources[key] = [], self._links_into(module, plan)
        for link in self.sources[key]:
            self.links[link.source].append(link)
            self.stages[link.source].consumers.append(tuple(link.names))
        self.stages[key] = Stage(
            module,
            plan,
            Parameters(module, plan, spec.optimizer, seed=spec.seed, dtype=spec.param_dtype),
            is_sink=module is self.graph.sink,
            x={n: link.boundary.destination[k] for link in self.sources[key] for k, n in link.names.items()},
            x_wanted=frozenset(
                n for link in self.sources[key] if self.stages[link.source].has_backward for n in link.names.values()
            ),
            batch=spec.batch,
            splits=spec.schedule == ZERO_BUBBLE and plan.share.replicas == 1,
        )

    def _links_into(self, module: Module, plan: StagePlan) -> list[Link]:
        """The carry, from the stage before; of other modules what enters here, from the last stages of all replicas."""
        target, links = plan.key, []
        if plan.index > 0:
            source, dims = (module.name, plan.index - 1), module.definition.carry
            y = self.stages[source].crosses
            where = {k: plan.grid.sharding(dims[k]) for k in y}
            links.append(Link(source, target, {k: k for k in y}, Boundary(y, where)))
        taken = module.definition.takes(plan.lo, plan.hi)
        for edge in [edge for edge in self.graph.edges if edge.consumer == module.name]:
            for source in (last.key for last in self.plans[edge.producer] if last.last):
                y = {k: a for k, a in self.stages[source].crosses.items() if edge.name(k) in taken}
                if not y:
                    break
                where = {k: plan.grid.sharding(("items", *(None,) * (a.ndim - 1))) for k, a in y.items()}
                links.append(Link(source, target, {k: edge.name(k) for k in y}, Boundary(y, where)))
        return links

    def _ties_of(self, key: StageKey) -> list[Tie]:
        """Those of the leaves that a stage borrows."""
        mine, owner_key = self.stages[key].parameters, (key[0], 0)
        if mine.is_replica:
            return self._ties_of_replica(owner_key, key)
        found = []
        for path in sorted(mine.borrowed):
            owners, gradients = ("first", mine.tied[path[1]]), None
            if at(mine.trainable, path) is not None:
                gradients = self._sharing(key, owner_key, "grads", [(path, owners)])
            found.append(Tie(owner_key, key, gradients, self._sharing(owner_key, key, "weights", [(owners, path)])))
        return found

    def _ties_of_replica(self, owner: StageKey, key: StageKey) -> list[Tie]:
        """One of what each step changes, and one of the frozen rest."""
        mine = self.stages[key].parameters
        trained, weights = flat(mine.trainable), list(flat(mine.weights))
        if mine.loads and not trained:
            raise ValueError(
                f"{key[0]}: a step moves biases of routers and trains nothing else, which Layout.replicas cannot do; "
                "freeze the biases too, or set replicas=1"
            )
        changing = [path for path in weights if path in trained or path in mine.balance.rows]
        found = []
        for paths, grads in ((changing, list(trained)), ([path for path in weights if path not in changing], [])):
            gradients = self._sharing(key, owner, "grads", [(path, path) for path in grads]) if grads else None
            if paths:
                values = self._sharing(owner, key, "weights", [(path, path) for path in paths])
                found.append(Tie(owner, key, gradients, values))
        return found

    def _sharing(self, source: StageKey, target: StageKey, tree: str, paths: Sequence[tuple[Path, Path]]) -> Sharing:
        """Of leaves of that tree of parameters, by their paths at both stages."""
        there, here = (getattr(self.stages[key].parameters, tree) for key in (source, target))
        named = {"/".join(path): (path, to) for path, to in paths}
        leaves = {name: at(there, path) for name, (path, _) in named.items()}
        where = {name: at(here, to).sharding for name, (_, to) in named.items()}
        return Sharing(named, Boundary(leaves, where, donated=True))

    @property
    def stages_here(self) -> dict[StageKey, Stage]:
        """Those of which this process drives a device."""
        return {key: stage for key, stage in self.stages.items() if key in self.mine}

    @functools.cached_property
    def between(self) -> dict[tuple[StageKey, StageKey], Link]:
        """The edges, by source and target."""
        return {(link.source, link.target): link for links in self.links.values() for link in links}

    def sources_of(self, key: StageKey, microbatch: int) -> list[Link]:
        """The edges by which something comes to a stage for a microbatch: of replicas from the one that it is given."""
        return [link for link in self.sources[key] if self.stages[link.source].plan.share.takes(microbatch)]

    def rows_here(self, name: str) -> frozenset[int]:
        """The rows of a microbatch's array that this process's devices want."""
        found: set[int] = set()
        for struct in (stage.batch[name] for stage in self.stages_here.values() if name in stage.batch):
            places = processes.places_here(struct.shape, struct.sharding)
            found.update(row for rows, *_ in places for row in range(*rows.indices(struct.shape[0])))
        return frozenset(found)

    def place(self, key: StageKey, microbatch: Prepared) -> list[jax.Array]:
        """What a stage reads, on its devices."""
        packed = zip(self.packings[key], microbatch.packed[key], strict=True)
        return [packing.place(words) for packing, words in packed]

    def is_mine(self, task: Task) -> bool:
        """Whether this process takes part in a task."""
        if task.kind is Kind.DECIDE or task.stage in self.mine or task.to in self.mine:
            return True
        if task.to is None:
            return False
        ends = task.stage, task.to
        if link := self.between.get(ends):
            return link.boundary.crosses()
        if link := self.between.get((task.to, task.stage)):
            return link.boundary.crosses(backward=True)
        gradients = (tie.gradients for tie in self.ties if (tie.copy, tie.owner) == ends)
        values = (tie.values for tie in self.ties if (tie.owner, tie.copy) == ends)
        return any(sharing.boundary.crosses() for sharing in (*gradients, *values) if sharing)

    @property
    def nodes(self) -> list[StageNode]:
        """The stages as the schedule sees them."""
        return [self._node(key, stage) for key, stage in self.stages.items()]

    def _node(self, key: StageKey, stage: Stage) -> StageNode:
        upstream = tuple(link.source for link in self.sources[key])
        end = None
        if stage.parameters.trains:
            end = Kind.REDUCE if stage.parameters.are_repeated else Kind.MEASURE
        offload = frozenset().union(*(OFFLOADS[kind] for kind in stage.module.layout.offload))
        devices, moves = frozenset(stage.plan.device_ids), bool(stage.parameters.loads)
        return StageNode(
            *key, devices, stage.has_backward, upstream, end, offload, moves, stage.plan.share, stage.splits
        )

    @property
    def boundaries(self) -> dict[str, Boundary]:
        """Every boundary, by the name of its edge."""
        return {link.name: link.boundary for link in self.between.values()}

    def thunks(self, *, evaluate: bool) -> list[tuple[str, Callable[[], object]]]:
        """(name, function that compiles it) of every program of stages and boundaries that this process runs."""
        found: list[tuple[str, Callable[[], object]]] = []
        for (module, index), stage in self.stages_here.items():
            found += [(f"{module}/{index} {name}", thunk) for name, thunk in stage.thunks(evaluate=evaluate).items()]
        for name, boundary in self.boundaries.items():
            found += [(f"{name} {program}", thunk) for program, thunk in boundary.programs()]
        return found
