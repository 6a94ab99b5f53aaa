"""When each task of a step begins and ends, if stages take as long as they are said to. Pure Python; imports no jax.

Stages of one module on the same devices are a lane: they take turns there, forwards in one fixed order and backwards in
another. Time goes from task end to task end. Whenever a lane's devices are free it starts the task at the head of one
of its orders, if all that this needs has ended; of lanes that share a device the one nearest to the loss comes first.
So what is run depends on needs, orders and costs alone, and is the same wherever it is simulated.

A lane that fills works in the holes of the others (`filling.py`): it starts a task if none of those that they have next
could begin sooner than it ends, or would make the step longer by beginning then:

    pipeline   a0 a1 a2 .  .  .  .  A0 a3 A1      . is a hole: A0 waits for other devices
    fills      .  .  .  e3 e4 e5 .  .  .  .       e6 would not be through when A0 is ready
"""

import collections
import heapq
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from hetjax.core.tasks import Cost, StageKey, Task

Order = collections.deque[Task]


class Span(NamedTuple):
    """From when to when a task works, in the unit of the costs."""

    begin: int
    end: int


def idle(spans: Mapping[Task, Span], devices: Mapping[StageKey, frozenset[int]], makespan: int) -> float:
    """The share of all devices' time, up to `makespan`, in which they have no task of `spans`; `devices` of stages."""
    worked = sum((span.end - span.begin) * len(devices[task.stage]) for task, span in spans.items())
    return 1 - worked / makespan / len(frozenset().union(*devices.values()))


class Lane(NamedTuple):
    """Devices of a module. `orders`: of its tasks there, that whose head is preferred first. `fills`: it works in the
    holes of others."""

    devices: frozenset[int]
    orders: tuple[Sequence[Task], ...]
    fills: bool = False


def simulate(
    lanes: Sequence[Lane],
    needs: Mapping[Task, Collection[Task]],
    costs: Mapping[StageKey, Cost],
    tails: Mapping[Task, int] = MappingProxyType({}),
) -> dict[Task, Span]:
    """The tasks of all lanes by their begin; of equal ones the lane nearest to the loss first.

    `lanes`: that nearest to the loss first. `needs`: of every task the ones, each once, that must have ended. `tails`:
    of all tasks, if a lane fills, the least time from a task's begin to the step's end; the longest goes first then.
    """
    simulation = _Simulation(lanes, needs, costs, tails)
    simulation.run()
    assert len(simulation.spans) == len(needs), "tasks wait for each other"
    return simulation.spans


class _Simulation:
    """What `simulate` knows at a moment."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        needs: Mapping[Task, Collection[Task]],
        costs: Mapping[StageKey, Cost],
        tails: Mapping[Task, int],
    ) -> None:
        self.needs, self.costs, self.tails = needs, costs, tails
        self.behind: dict[Task, list[Task]] = collections.defaultdict(list)
        for task, before in needs.items():
            for other in before:
                self.behind[other].append(task)
        self.waits = {task: len(before) for task, before in needs.items()}
        self.lane_of = {task: n for n, lane in enumerate(lanes) for order in lane.orders for task in order}
        self.orders = [[collections.deque(order) for order in lane.orders] for lane in lanes]
        self.rivals = [[n for n, other in enumerate(lanes) if lane.devices & other.devices] for lane in lanes]
        self.fillers = {n for n, lane in enumerate(lanes) if lane.fills}
        self.spans: dict[Task, Span] = {}
        self.working: set[int] = set()
        self.ends: list[tuple[int, int, Task]] = []
        self.now = 0
        self.least = max(tails.values(), default=0)  # the step ends no sooner

    def run(self) -> None:
        """All tasks, from the first's begin to the last one's end."""
        changed = set(range(len(self.orders)))
        while True:
            for n in self._by_preference(changed):
                self._start(n, self._heads(n))
            if not self.ends:
                for n in sorted(self.fillers):  # none will come for which they could wait
                    self._start(n, self._ready(n))
            if not self.ends:
                return
            changed = self._end()

    def _by_preference(self, changed: set[int]) -> list[int]:
        """The lanes that may start a task."""
        if not self.fillers:
            return sorted(changed)
        tail = lambda n: max((self.tails[order[0]] for order in self._ready(n)), default=0)
        free = [n for n in changed | self.fillers if self.working.isdisjoint(self.rivals[n])]
        return sorted(free, key=lambda n: (-tail(n), n))

    def _start(self, n: int, heads: list[Order]) -> None:
        if heads and self.working.isdisjoint(self.rivals[n]):
            task = heads[0].popleft()
            self.spans[task] = Span(self.now, self.now + self.costs[task.stage].of(task.kind))
            heapq.heappush(self.ends, (self.spans[task].end, n, task))
            self.working.add(n)
            self.least = max(self.least, self.now + self.tails.get(task, 0))

    def _end(self) -> set[int]:
        """Goes on to the next end of tasks; the lanes that have become free, or one of whose tasks is ready."""
        self.now, changed = self.ends[0][0], set()
        while self.ends and self.ends[0][0] == self.now:
            _, n, task = heapq.heappop(self.ends)
            self.working.remove(n)
            changed.update(self.rivals[n])
            for other in self.behind[task]:
                self.waits[other] -= 1
                changed.add(self.lane_of[other])
        return changed

    def _ready(self, n: int) -> list[Order]:
        """Those orders of a lane whose heads have all that they need."""
        return [order for order in self.orders[n] if order and not self.waits[order[0]]]

    def _heads(self, n: int) -> list[Order]:
        """... and whose heads may start now."""
        ready = self._ready(n)
        return ready if n not in self.fillers else [order for order in ready if self._fits(n, order[0])]

    def _fits(self, n: int, task: Task) -> bool:
        """Whether none of the next tasks of its devices would begin later for this one, and the step end later."""
        end = self.now + self.costs[task.stage].of(task.kind)
        others = [order for rival in self.rivals[n] if rival not in self.fillers for order in self.orders[rival]]
        heads = [order[0] for order in others if order]
        return all(end + self.tails[head] <= self.least or not self._could_begin(head, end) for head in heads)

    def _could_begin(self, task: Task, before: int) -> bool:
        """Whether a task could begin before that time, if devices were free whenever a task is ready."""
        for need in self.needs[task]:
            if need in self.spans:
                if self.spans[need].end >= before:
                    return False
            else:
                latest = before - self.costs[need.stage].of(need.kind)
                if latest <= self.now or not self._could_begin(need, latest):
                    return False
        return True
