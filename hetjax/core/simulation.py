"""When each task of a step begins and ends, if stages take as long as they are said to. Pure Python; imports no jax.

Stages of one module on the same devices are a lane: they take turns there, forwards in one fixed order and backwards in
another. Time goes from task end to task end. Whenever a lane's devices are free it starts the task at the head of one
of its orders, if all that this needs has ended; of lanes that share a device the one nearest to the loss comes first.
So what is run depends on needs, orders and costs alone, and is the same wherever it is simulated.
"""

import collections
import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from hetjax.core.tasks import Cost, StageKey, Task


class Span(NamedTuple):
    """From when to when a task works, in the unit of the costs."""

    begin: int
    end: int


def idle(spans: Mapping[Task, Span], devices: Mapping[StageKey, frozenset[int]], makespan: int) -> float:
    """The share of all devices' time, up to `makespan`, in which they have no task of `spans`; `devices` of stages."""
    worked = sum((span.end - span.begin) * len(devices[task.stage]) for task, span in spans.items())
    return 1 - worked / makespan / len(frozenset().union(*devices.values()))


class Lane(NamedTuple):
    """Devices of a module. `orders`: of its tasks there, that whose head is preferred first."""

    devices: frozenset[int]
    orders: tuple[Sequence[Task], ...]


def simulate(
    lanes: Sequence[Lane], needs: Mapping[Task, Collection[Task]], costs: Mapping[StageKey, Cost]
) -> dict[Task, Span]:
    """The tasks of all lanes by their begin; of equal ones the lane nearest to the loss first.

    `lanes`: that nearest to the loss first. `needs`: of every task the ones, each once, that must have ended.
    """
    behind: dict[Task, list[Task]] = collections.defaultdict(list)
    for task, before in needs.items():
        for other in before:
            behind[other].append(task)
    waits = {task: len(before) for task, before in needs.items()}
    lane_of = {task: n for n, lane in enumerate(lanes) for order in lane.orders for task in order}
    orders = [[collections.deque(order) for order in lane.orders] for lane in lanes]
    rivals = [[n for n, other in enumerate(lanes) if lane.devices & other.devices] for lane in lanes]
    spans: dict[Task, Span] = {}
    working: set[int] = set()
    ends: list[tuple[int, int, Task]] = []
    changed, now = set(range(len(lanes))), 0
    while True:
        for n in sorted(changed):
            head = next((order for order in orders[n] if order and not waits[order[0]]), None)
            if head is not None and working.isdisjoint(rivals[n]):
                task = head.popleft()
                spans[task] = Span(now, now + costs[task.stage].of(task.kind))
                heapq.heappush(ends, (spans[task].end, n, task))
                working.add(n)
        if not ends:
            break
        now, changed = ends[0][0], set()
        while ends and ends[0][0] == now:
            _, n, task = heapq.heappop(ends)
            working.remove(n)
            changed.update(rivals[n])
            for other in behind[task]:
                waits[other] -= 1
                changed.add(lane_of[other])
    assert len(spans) == len(needs), "tasks wait for each other"
    return spans
