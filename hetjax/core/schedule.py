"""In which order the stages of all modules work on the microbatches. Pure Python; imports no jax.

A schedule is found by simulating the devices: whenever a stage's devices are free it takes the task that its policy
prefers, within a bound on the microbatches in flight. GPipe (arXiv:1811.06965) is forwards first without a bound; 1F1B
(PipeDream-Flush, arXiv:2006.09503) is backwards first with a bound of the stages from here to the loss. Two stages,
three microbatches, 1F1B:

    stage 0   F0 F1 .  .  B0 F2 .  .  B1 .  .  B2
    stage 1   .  F0 B0 .  F1 B1 .  .  F2 B2

Modules that share devices with the sink run in windows instead: encode a window of microbatches, run the sink over
them, then the encoders' backwards (arXiv:2605.27678's three phases, when the window is the whole step).

The result is one list of all tasks of a step, which is the same wherever it is built. A boundary stands where its
producer ends in the simulation: earlier, the devices that receive would wait for it with other work in hand; later, it
would stand behind the sender's next task.
"""

import collections
import dataclasses
from collections.abc import Sequence

from hetjax.core.offload import Moment, moments, with_moves
from hetjax.core.tasks import Kind, Needs, StageKey, StageNode, Task, Thing

KINDS = ("1f1b", "gpipe")
COST = {Kind.FORWARD: 1, Kind.BACKWARD: 2}  # of a task, for the order that the simulation finds


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`gradients`: every task up to the finished gradients, in order. `update`: those behind them.

    `max_in_flight`: per stage, the most microbatches whose forward is done and backward is not. `home`: what of the
    stages lies on the host between steps. `moments`: what is where while a task computes, each once.
    """

    gradients: tuple[Task, ...]
    update: tuple[Task, ...]
    max_in_flight: dict[StageKey, int]
    home: frozenset[Thing]
    moments: tuple[Moment, ...]

    @property
    def order(self) -> tuple[Task, ...]:
        """Every task of a step."""
        return self.gradients + self.update


def build_schedule(
    nodes: Sequence[StageNode],
    num_microbatches: int,
    *,
    kind: str = "1f1b",
    encoder_window: int | None = None,
    ties: Sequence[tuple[StageKey, StageKey]] = (),
) -> Schedule:
    """The schedule of one step. `encoder_window` None: colocated encoders run ahead over the whole step.

    `nodes` and `ties` as in `Needs`.

    Raises ValueError for an unknown kind or a window outside of 1 to `num_microbatches`.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule={kind!r}; it must be one of {', '.join(KINDS)}")
    window = num_microbatches if encoder_window is None else encoder_window
    if not 1 <= window <= num_microbatches:
        raise ValueError(
            f"encoder_window={window} is outside of 1 to num_microbatches={num_microbatches}; None means all of them"
        )
    needs = Needs(nodes, num_microbatches, ties)
    simulation = _Simulation(nodes, needs, num_microbatches, kind, window)
    computed = simulation.run()
    tasks = [*_with_ends(computed, simulation.end, needs), *needs.behind_gradients()]
    tasks, home = with_moves(tasks, needs)
    decide, found = tasks.index(needs.decide), tuple(dict.fromkeys(moments(tasks, needs, home)))
    return Schedule(tuple(tasks[:decide]), tuple(tasks[decide:]), _in_flight(nodes, computed), home, found)


def _with_ends(computed: Sequence[Task], end: dict[Task, float], needs: Needs) -> list[Task]:
    """The tasks of microbatches with what follows them, by simulated time: boundaries first, then finished stages."""
    last = {task.stage: task for task in computed if task.kind is Kind.BACKWARD}
    events = []
    for task in computed:
        events += [(end[task], 0, t) for t in needs.boundaries_behind(task)]
        if last.get(task.stage) == task:
            events += [(end[task], 1, t) for t in needs.finished(task.stage)]
        events.append((end[task] - COST[task.kind], 2, task))
    return [task for _, _, task in sorted(events, key=lambda event: event[:2])]


class _Simulation:
    """Time runs from task end to task end; a stage holds all its devices while it works."""

    def __init__(self, nodes: Sequence[StageNode], needs: Needs, num_microbatches: int, kind: str, window: int) -> None:
        self.nodes, self.num_microbatches, self.kind, self.window = list(nodes), num_microbatches, kind, window
        self.consumers = needs.consumers
        self.sink = nodes[-1].module
        sink_devices = frozenset().union(*(n.devices for n in nodes if n.module == self.sink))
        self.windowed = {n.module for n in nodes if n.module != self.sink and n.devices & sink_devices}
        self.depth: dict[StageKey, int] = {}
        for node in reversed(self.nodes):  # producers come before their consumers
            self.depth[node.key] = 1 + max((self.depth[k] for k in self.consumers[node.key]), default=0)
        self.needs = {task: needs.computed(task) for task in needs.of_microbatches()}
        self.end: dict[Task, float] = {}

    def run(self) -> list[Task]:
        free_at = {d: 0.0 for n in self.nodes for d in n.devices}
        waiting = {
            n.key: [collections.deque(t for t in self.needs if t.stage == n.key and t.kind is k) for k in COST]
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
        bound = self._bound(task.stage)
        if task.microbatch < bound:
            return True
        released = task.microbatch - bound
        if Task(Kind.BACKWARD, task.stage, released) in self.needs:
            return self._done(Task(Kind.BACKWARD, task.stage, released), now)
        return all(self._done(Task(Kind.FORWARD, k, released), now) for k in self.consumers[task.stage])

    def _bound(self, key: StageKey) -> int:
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
        if task.stage[0] in self.windowed and task.kind is Kind.FORWARD:
            before = range(max(0, members.start - self.window), members.start)
            return all(
                self._done(Task(Kind.BACKWARD, n.key, i), now)
                for i in before
                for n in self.nodes
                if n.module == self.sink or n.module in self.windowed
            )
        if task.stage[0] in self.windowed:
            return all(
                self._done(Task(Kind.BACKWARD, n.key, i), now)
                for i in members
                for n in self.nodes
                if n.module == self.sink
            )
        if task.stage[0] == self.sink:
            return all(self._done(Task(Kind.FORWARD, n.key, i), now) for i in members for n in shared)
        return True


def _in_flight(nodes: Sequence[StageNode], order: Sequence[Task]) -> dict[StageKey, int]:
    most = {n.key: 0 for n in nodes}
    alive = dict(most)
    has_backward = {n.key: n.backward for n in nodes}
    for task in order:
        alive[task.stage] += 1 if task.kind is Kind.FORWARD else -1
        if has_backward[task.stage]:
            most[task.stage] = max(most[task.stage], alive[task.stage])
    return most
