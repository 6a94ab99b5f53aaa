"""In which order the stages of all modules work on the microbatches. Pure Python; imports no jax.

A schedule is found by simulating the devices: whenever a stage's devices are free it takes the task that its policy
prefers, within a bound on the microbatches in flight. GPipe (arXiv:1811.06965) is forwards first without a bound; 1F1B
(PipeDream-Flush, arXiv:2006.09503) is backwards first with a bound of the stages from here to the loss. Two stages,
three microbatches, 1F1B:

    stage 0   F0 F1 .  .  B0 F2 .  .  B1 .  .  B2
    stage 1   .  F0 B0 .  F1 B1 .  .  F2 B2

Modules that share devices with the sink run in windows instead: encode a window of microbatches, run the sink over
them, then the encoders' backwards (arXiv:2605.27678's three phases, when the window is the whole step).
"""

import collections
import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("1f1b", "gpipe")


class Kind(enum.Enum):
    """What a task does with its microbatch."""

    FORWARD = "F"
    BACKWARD = "B"


COST = {Kind.FORWARD: 1, Kind.BACKWARD: 2}  # of a task, for the order that the simulation finds


class Task(NamedTuple):
    """One stage's work on one microbatch."""

    module: str
    stage: int
    microbatch: int
    kind: Kind

    @property
    def key(self) -> tuple[str, int]:
        """The stage that runs it."""
        return self.module, self.stage


@dataclasses.dataclass(frozen=True)
class StageNode:
    """A stage as the schedule sees it. `upstream`: the stages whose output it takes. `backward`: it has such tasks."""

    module: str
    stage: int
    devices: frozenset[int]
    backward: bool
    upstream: tuple[tuple[str, int], ...]

    @property
    def key(self) -> tuple[str, int]:
        """Its name."""
        return self.module, self.stage


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`order`: every task, by simulated start. `groups`: the same per set of devices that stages share.

    `max_in_flight`: per stage, the most microbatches whose forward is done and backward is not.
    """

    order: tuple[Task, ...]
    groups: tuple[tuple[Task, ...], ...]
    max_in_flight: dict[tuple[str, int], int]


def dependencies(task: Task, nodes: Sequence[StageNode]) -> list[Task]:
    """The tasks whose results `task` takes."""
    node = next(n for n in nodes if n.key == task.key)
    if task.kind is Kind.FORWARD:
        return [Task(*key, task.microbatch, Kind.FORWARD) for key in node.upstream]
    later = [Task(*n.key, task.microbatch, Kind.BACKWARD) for n in nodes if task.key in n.upstream]
    return [task._replace(kind=Kind.FORWARD), *later]


def build_schedule(
    nodes: Sequence[StageNode], num_microbatches: int, *, kind: str = "1f1b", encoder_window: int | None = None
) -> Schedule:
    """The schedule of one step. `encoder_window` None: colocated encoders run ahead over the whole step.

    Raises ValueError for an unknown kind or a window outside of 1 to `num_microbatches`.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule={kind!r}; it must be one of {', '.join(KINDS)}")
    window = num_microbatches if encoder_window is None else encoder_window
    if not 1 <= window <= num_microbatches:
        raise ValueError(
            f"encoder_window={window} is outside of 1 to num_microbatches={num_microbatches}; None means all of them"
        )
    order = _Simulation(nodes, num_microbatches, kind, window).run()
    groups = tuple(tuple(t for t in order if t.key in group) for group in _groups(nodes))
    return Schedule(tuple(order), groups, _in_flight(nodes, order))


class _Simulation:
    """Time runs from task end to task end; a stage holds all its devices while it works."""

    def __init__(self, nodes: Sequence[StageNode], num_microbatches: int, kind: str, window: int) -> None:
        self.nodes, self.num_microbatches, self.kind, self.window = list(nodes), num_microbatches, kind, window
        self.consumers = {n.key: [m.key for m in nodes if n.key in m.upstream] for n in nodes}
        sink = next(n.module for n in nodes if not self.consumers[n.key])
        sink_devices = frozenset().union(*(n.devices for n in nodes if n.module == sink))
        shared = {n.module for n in nodes if n.module != sink and n.devices & sink_devices}
        self.windowed = shared
        self.sink = sink
        self.depth: dict[tuple[str, int], int] = {}
        for node in reversed(self.nodes):  # producers come before their consumers
            self.depth[node.key] = 1 + max((self.depth[k] for k in self.consumers[node.key]), default=0)
        self.needs = {
            t: dependencies(t, nodes)
            for n in nodes
            for i in range(num_microbatches)
            for k in Kind
            for t in [Task(*n.key, i, k)]
            if k is Kind.FORWARD or n.backward
        }
        self.end: dict[Task, float] = {}

    def run(self) -> list[Task]:
        free_at = {d: 0.0 for n in self.nodes for d in n.devices}
        waiting = {
            n.key: [collections.deque(t for t in self.needs if t.key == n.key and t.kind is k) for k in Kind]
            for n in self.nodes
        }
        order: list[Task] = []
        now = 0.0
        while len(order) < len(self.needs):
            started = False
            for node in reversed(self.nodes):  # the stage nearest to the loss first
                if any(free_at[d] > now for d in node.devices):
                    continue
                ready = [queue for queue in waiting[node.key] if queue and self._may_start(queue[0], now)]
                if ready:
                    task = min(ready, key=lambda queue: self._preference(queue[0])).popleft()
                    order.append(task)
                    self.end[task] = now + COST[task.kind]
                    free_at.update(dict.fromkeys(node.devices, self.end[task]))
                    started = True
            if not started:
                now = min(t for t in self.end.values() if t > now)
        return order

    def _preference(self, task: Task) -> bool:
        return (task.kind is Kind.FORWARD) == (self.kind == "1f1b")

    def _done(self, task: Task, now: float) -> bool:
        return task not in self.needs or self.end.get(task, float("inf")) <= now

    def _may_start(self, task: Task, now: float) -> bool:
        if not all(self._done(t, now) for t in self.needs[task]):
            return False
        if self.windowed and not self._in_phase(task, now):
            return False
        if task.kind is Kind.BACKWARD:
            return self.kind == "1f1b" or all(
                self._done(task._replace(microbatch=i, kind=Kind.FORWARD), now) for i in self._peers(task)
            )
        bound = self._bound(task.key)
        if task.microbatch < bound:
            return True
        released = task.microbatch - bound
        if Task(*task.key, released, Kind.BACKWARD) in self.needs:
            return self._done(Task(*task.key, released, Kind.BACKWARD), now)
        return all(self._done(Task(*k, released, Kind.FORWARD), now) for k in self.consumers[task.key])

    def _bound(self, key: tuple[str, int]) -> int:
        if key[0] in self.windowed:
            return self.num_microbatches
        return self.num_microbatches if self.kind == "gpipe" else self.depth[key]

    def _peers(self, task: Task) -> range:
        """The microbatches that run through all forwards together before a GPipe backward."""
        if not self.windowed:
            return range(self.num_microbatches)
        return self._window_of(task.microbatch)

    def _window_of(self, microbatch: int) -> range:
        start = microbatch - microbatch % self.window
        return range(start, min(start + self.window, self.num_microbatches))

    def _in_phase(self, task: Task, now: float) -> bool:
        """Colocated encoders: forwards of a window, the sink over it, their backwards, then the next window."""
        members = self._window_of(task.microbatch)
        shared = [n for n in self.nodes if n.module in self.windowed]
        if task.module in self.windowed and task.kind is Kind.FORWARD:
            before = range(max(0, members.start - self.window), members.start)
            last = Kind.BACKWARD
            return all(
                self._done(Task(*n.key, i, last), now)
                for i in before
                for n in self.nodes
                if n.module == self.sink or n.module in self.windowed
            )
        if task.module in self.windowed:
            return all(
                self._done(Task(*n.key, i, Kind.BACKWARD), now)
                for i in members
                for n in self.nodes
                if n.module == self.sink
            )
        if task.module == self.sink:
            return all(self._done(Task(*n.key, i, Kind.FORWARD), now) for i in members for n in shared)
        return True


def _groups(nodes: Sequence[StageNode]) -> list[set[tuple[str, int]]]:
    """Stages joined by the devices they share."""
    groups: list[tuple[set[tuple[str, int]], set[int]]] = []
    for node in nodes:
        touching = [g for g in groups if g[1] & node.devices]
        groups = [g for g in groups if not g[1] & node.devices]
        groups.append(({node.key}.union(*(g[0] for g in touching)), set(node.devices).union(*(g[1] for g in touching))))
    return [keys for keys, _ in groups]


def _in_flight(nodes: Sequence[StageNode], order: Sequence[Task]) -> dict[tuple[str, int], int]:
    most = {n.key: 0 for n in nodes}
    alive = dict(most)
    has_backward = {n.key: n.backward for n in nodes}
    for task in order:
        alive[task.key] += 1 if task.kind is Kind.FORWARD else -1
        if has_backward[task.key]:
            most[task.key] = max(most[task.key], alive[task.key])
    return most
