"""What a step is made of: its tasks, and what each of them needs. Pure Python; imports no jax."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

StageKey = tuple[str, int]  # module and number of the stage
ZERO_BUBBLE = "zerobubble"  # the schedule under which backwards are split


class Kind(enum.Enum):
    """What a task does."""

    FORWARD = "F"
    BACKWARD = "B"  # of a stage that splits it, the half that gives the cotangents of the inputs
    WEIGHTS = "W"  # ... and the other half: the gradients of its layers' weights, which nobody waits for
    BOUNDARY = "boundary"  # outputs to the stage that takes them, or their gradients back
    REDUCE = "reduce"  # completes the gradients of a stage of several data replicas, and measures them
    MEASURE = "measure"  # measures those of a stage of one, which are complete
    TIE = "tie"  # a tied leaf's gradient from the copy to its owner, or the new value back
    DECIDE = "decide"  # loss, norm, clip factor, and whether the step counts
    UPDATE = "update"
    LEAVE = "leave"  # a thing's copy to the host's memory begins; nobody uses the one on the device from here on
    GONE = "gone"  # ... which is waited for: its memory on the device is free
    RETURN = "return"  # the thing is on the device again

    __hash__ = object.__hash__  # that of `Enum` is Python's, asked some twenty times per task


OF_MICROBATCHES = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHTS)
COMPUTING = frozenset({*OF_MICROBATCHES, Kind.REDUCE, Kind.MEASURE, Kind.UPDATE})


class What(enum.Enum):
    """What a stage holds on its devices. All but the last two may be in the host's memory instead, between two uses."""

    WEIGHTS = "weights"  # what the programs are given of the parameters
    MASTERS = "masters"  # the parameters that have working weights beside them
    STATE = "state"  # of the optimizer
    RESIDUALS = "residuals"  # what the backward of a microbatch needs of its forward
    INPUTS = "inputs"  # of a microbatch, from another stage
    COTANGENTS = "cotangents"  # of the outputs of a microbatch
    PAIRS = "pairs"  # of a microbatch: of each product its input and the cotangent of its output (`WEIGHTS`)
    SUMS = "sums"  # of gradients over replicas, from their reduction to the step's end

    __hash__ = object.__hash__


OFFLOADS = {
    "parameters": frozenset({What.WEIGHTS, What.MASTERS}),
    "optimizer": frozenset({What.STATE}),
    "residuals": frozenset({What.RESIDUALS}),
    "boundaries": frozenset({What.INPUTS, What.COTANGENTS}),
}  # by the name that a layout has for them


OF_STAGES = (What.WEIGHTS, What.MASTERS, What.STATE)  # and of no microbatch


class Thing(NamedTuple):
    """What a stage holds. `microbatch` -1: of no microbatch. `source`: the stage that inputs, or cotangents, come
    from."""

    what: What
    stage: StageKey
    microbatch: int = -1
    source: StageKey | None = None


class Task(NamedTuple):
    """One piece of work of a stage. `microbatch` -1: of the step's end. `to`: the stage that gets what moves. `thing`:
    what leaves or returns."""

    kind: Kind
    stage: StageKey
    microbatch: int = -1
    to: StageKey | None = None
    thing: Thing | None = None


class Cost(NamedTuple):
    """How long the tasks of a stage take, of one microbatch, in any unit; whole numbers, so that sums are exact.

    `weights`: what of a backward is a task of its own, 0 where it is not split."""

    forward: int = 1
    backward: int = 2
    weights: int = 0

    def of(self, kind: Kind) -> int:
        """Of a task of a microbatch; at least 1, so that what follows it comes behind it."""
        each = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward - self.weights,
            Kind.WEIGHTS: self.weights,
        }
        return max(each[kind], 1)


class HostTimes(NamedTuple):
    """Where the host thread's time went on the way to a step's gradients."""

    tasks: int
    dispatch_seconds: float  # of all tasks
    boundary_seconds: float  # of those that are boundaries
    wait_seconds: float  # for a stage with enough of them in hand


@dataclasses.dataclass(frozen=True)
class Share:
    """Of `replicas` that do the same, each with every so many-th microbatch, those of number `replica`."""

    replica: int = 0
    replicas: int = 1

    def takes(self, microbatch: int) -> bool:
        """Whether a microbatch is one of them."""
        return microbatch % self.replicas == self.replica

    def of(self, num_microbatches: int) -> range:
        """Those of a step."""
        return range(self.replica, num_microbatches, self.replicas)


@dataclasses.dataclass(frozen=True)
class StageNode:
    """A stage as the schedule sees it. `upstream`: the stages whose output it takes. `backward`: it has such tasks, and
    `splits`: each of them in two.

    `end`: how its gradients are finished, by `REDUCE` or `MEASURE`; None where nothing of it trains. `offload`: what of
    it leaves its devices between two uses. `moves`: the step's end moves some of its parameters without gradients.
    `share`: of which replica, and so of which microbatches, it is; the step's end updates the first replica alone.
    """

    module: str
    stage: int
    devices: frozenset[int]
    backward: bool
    upstream: tuple[StageKey, ...]
    end: Kind | None = None
    offload: frozenset[What] = frozenset()
    moves: bool = False
    share: Share = Share()
    splits: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of the tasks that it has for each of its microbatches."""
        return OF_MICROBATCHES[: 1 + self.backward + self.splits]

    @property
    def key(self) -> StageKey:
        """Its name."""
        return self.module, self.stage

    @property
    def updates(self) -> bool:
        """Whether the step's end changes its parameters in a task of its own."""
        return self.share.replica == 0 and (self.end is not None or self.moves)


class Needs:
    """Which tasks a step has, and which each of them needs.

    `nodes`: producers before their consumers, the stage that ends in the loss last. `ties`: (copy, owner) of the
    stages that share a leaf.
    """

    def __init__(
        self, nodes: Sequence[StageNode], num_microbatches: int, ties: Sequence[tuple[StageKey, StageKey]] = ()
    ) -> None:
        self.nodes = {n.key: n for n in nodes}
        self.consumers = {n.key: [m.key for m in nodes if n.key in m.upstream] for n in nodes}
        self._num, self._ties = num_microbatches, list(ties)
        self.decide = Task(Kind.DECIDE, nodes[-1].key)

    def microbatches(self, key: StageKey) -> range:
        """Those of a stage."""
        return self.nodes[key].share.of(self._num)

    def upstream(self, key: StageKey, microbatch: int) -> list[StageKey]:
        """The stages whose output a stage takes for a microbatch."""
        return [source for source in self.nodes[key].upstream if self.nodes[source].share.takes(microbatch)]

    def of_microbatches(self) -> list[Task]:
        """Every forward and backward, and every half of one."""
        return [
            Task(kind, node.key, i)
            for node in self.nodes.values()
            for kind in node.kinds
            for i in self.microbatches(node.key)
        ]

    def boundaries_behind(self, task: Task) -> list[Task]:
        """The boundaries that carry what a task of a microbatch gives."""
        to: list[StageKey] = []
        if task.kind is Kind.FORWARD:
            to = self.consumers[task.stage]
        elif task.kind is Kind.BACKWARD:
            to = [key for key in self.upstream(task.stage, task.microbatch) if self.nodes[key].backward]
        return [Task(Kind.BOUNDARY, task.stage, task.microbatch, key) for key in to]

    def finished(self, key: StageKey) -> list[Task]:
        """The task that finishes a stage's gradients, if any."""
        end = self.nodes[key].end
        return [] if end is None else [Task(end, key)]

    def behind_gradients(self) -> list[Task]:
        """Ties' gradients, the decision, updates, ties' values: what follows when every stage is finished."""
        updates = [Task(Kind.UPDATE, key) for key, node in self.nodes.items() if node.updates]
        there = [Task(Kind.TIE, copy, to=owner) for copy, owner in self._ties]
        back = [Task(Kind.TIE, owner, to=copy) for copy, owner in self._ties]
        return [*there, self.decide, *updates, *back]

    def of(self, task: Task) -> list[Task]:
        """The tasks whose results `task` takes."""
        kind, key, i, to, _ = task
        if kind is Kind.FORWARD:
            return [Task(Kind.BOUNDARY, source, i, key) for source in self.upstream(key, i)]
        if kind is Kind.BACKWARD:
            later = [Task(Kind.BOUNDARY, consumer, i, key) for consumer in self.consumers[key]]
            return [Task(Kind.FORWARD, key, i), *later]
        if kind is Kind.BOUNDARY:
            return [Task(Kind.FORWARD if to in self.consumers[key] else Kind.BACKWARD, key, i)]
        if kind is Kind.WEIGHTS:
            return [Task(Kind.BACKWARD, key, i)]
        if kind in (Kind.REDUCE, Kind.MEASURE):
            return [Task(half, key, n) for half in self.nodes[key].kinds[1:] for n in self.microbatches(key)]
        if kind is Kind.TIE and to is not None:
            if (key, to) in self._ties:
                return [*self.finished(key), *self.finished(to)]
            return [Task(Kind.UPDATE, end) for end in (key, to) if self.nodes[end].updates]
        if kind is Kind.DECIDE:
            losses = [Task(Kind.BACKWARD, key, n) for n in range(self._num)]
            there = [Task(Kind.TIE, copy, to=owner) for copy, owner in self._ties]
            return [*losses, *(t for n in self.nodes for t in self.finished(n)), *there]
        return [self.decide]  # an update

    def writes(self, task: Task) -> list[Thing]:
        """What `task` makes, or changes."""
        kind, key, i, to, _ = task
        if kind is Kind.FORWARD:
            return [Thing(What.RESIDUALS, key, i)] if self.nodes[key].backward else []
        if kind is Kind.BACKWARD:
            return [Thing(What.PAIRS, key, i)] if self.nodes[key].splits else []
        if kind is Kind.BOUNDARY and to is not None:
            forward = to in self.consumers[key]
            return [Thing(What.INPUTS, to, i, key) if forward else Thing(What.COTANGENTS, to, i, key)]
        if kind is Kind.REDUCE:
            return [Thing(What.SUMS, key)]
        if kind is Kind.UPDATE:
            return [Thing(what, key) for what in OF_STAGES]
        if kind is Kind.TIE and to is not None and (key, to) not in self._ties:
            return [Thing(What.WEIGHTS, to)]
        return []

    def reads(self, task: Task) -> list[Thing]:
        """What must be on the devices for `task`, beside what it makes."""
        kind, key, i, to, _ = task
        if kind in (Kind.FORWARD, Kind.BACKWARD):
            given = [Thing(What.WEIGHTS, key), *(Thing(What.INPUTS, key, i, k) for k in self.upstream(key, i))]
            if kind is Kind.FORWARD:
                return given
            cotangents = (Thing(What.COTANGENTS, key, i, consumer) for consumer in self.consumers[key])
            return [*given, Thing(What.RESIDUALS, key, i), *cotangents]
        if kind is Kind.WEIGHTS:
            return [Thing(What.PAIRS, key, i)]
        if kind is Kind.TIE and to is not None and (key, to) not in self._ties:
            return [Thing(What.WEIGHTS, key)]
        return []

    def computed(self, task: Task) -> list[Task]:
        """The tasks of microbatches whose results one of them takes, however they come to it."""
        direct = self.of(task)
        return [t for need in direct for t in (self.of(need) if need.kind is Kind.BOUNDARY else [need])]
