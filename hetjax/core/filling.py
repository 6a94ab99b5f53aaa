"""Replicas of a module, placed in the holes that the other modules leave on their devices. Imports no jax.

The others keep, each on its devices, the order in which they work without the replicas. So behind each task is a chain
of those that wait for it, or take their turn after it, to the step's end: with the task itself the longest is its tail.
The step ends no sooner than a task's tail behind its begin, and what is put in front of a task is harmless as long as
that is no later than the step ends anyway. Of tasks that are ready on the same devices the one with the longest tail
goes first: forwards that fit no hole run when the language model would wait for them, backwards behind the others.
"""

import collections
import graphlib
import itertools
from collections.abc import Mapping, Sequence

from hetjax.core import halves
from hetjax.core.orders import Orders
from hetjax.core.simulation import Lane, Span, simulate
from hetjax.core.tasks import Cost, Kind, StageKey, Task


def filled(orders: Orders, without: Mapping[Task, Span], costs: Mapping[StageKey, Cost]) -> dict[Task, Span]:
    """The tasks of a step by their begin, the shortest of steps in which the replicas are more or less ahead.

    `without`: the same step without the replicas."""
    lanes, needs = _in_order(orders.lanes, without), orders.needs() | halves.needs(orders.graph)
    tails = (_tails(lanes, _ahead(orders, needs, lead), costs) for lead in _leads(orders))
    steps = (simulate(lanes, needs, costs, mine) for mine in tails)
    return min(steps, key=lambda spans: max(span.end for span in spans.values()))


def _leads(orders: Orders) -> list[int]:
    """How many microbatches the replicas may be ahead before the language model goes first: from none to as many as
    there may be, since behind a window's forwards come backwards, for which the language model has to go on."""
    first = max(node.share.replicas for node in orders.nodes.values())
    most = orders.num if orders.most == orders.num else orders.most - max(map(orders.bounds.__getitem__, orders.sink))
    return [0, *(first * 2**n for n in range(most.bit_length()) if first * 2**n < most), *[most] * (most > 0)]


def _ahead(orders: Orders, needs: Mapping[Task, Sequence[Task]], lead: int) -> dict[Task, list[Task]]:
    """What tasks need, and beside it that replicas be so far ahead."""
    found = {task: list(others) for task, others in needs.items()}
    for key in (key for key, node in orders.nodes.items() if node.share.replicas > 1):
        taker = orders.graph.consumers[key][0]
        for i in orders.graph.microbatches(key):
            found[Task(Kind.FORWARD, taker, max(i - lead, 0))].append(Task(Kind.FORWARD, key, i))
    return found


def _in_order(lanes: Sequence[Lane], spans: Mapping[Task, Span]) -> list[Lane]:
    """The lanes; of those that do not fill all tasks in one order, that of `spans`."""
    lane_of = {task.stage: n for n, lane in enumerate(lanes) for order in lane.orders for task in order}
    tasks: dict[int, list[Task]] = collections.defaultdict(list)
    for task in spans:
        tasks[lane_of[task.stage]].append(task)
    return [lane if lane.fills else lane._replace(orders=(tasks[n],)) for n, lane in enumerate(lanes)]


def _tails(lanes: Sequence[Lane], before: dict[Task, list[Task]], costs: Mapping[StageKey, Cost]) -> dict[Task, int]:
    """Of each task the longest chain from its begin to the step's end; `before`: of each those that come first."""
    for order in itertools.chain.from_iterable(lane.orders for lane in lanes):
        for task, following in itertools.pairwise(order):
            before[following].append(task)
    tails = {task: costs[task.stage].of(task.kind) for task in before}
    for task in reversed(list(graphlib.TopologicalSorter(before).static_order())):
        for other in before[task]:
            tails[other] = max(tails[other], costs[other.stage].of(other.kind) + tails[task])
    return tails
