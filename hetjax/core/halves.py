"""Where the halves of backwards go that give the weights' gradients: zero-bubble, ZB-H1 (arXiv:2401.10241).

Nobody waits for such a half, so it may stand where a stage would wait for others. Forwards and backwards keep the order
that 1F1B has for them. Behind a backward comes the oldest half that is still to do, once as many are left as the stage
has fewer microbatches in flight than the first one of its module; what is left behind the last backward fills the hole
there. So each stage keeps something of as many microbatches as that first one under 1F1B, and no more. Three stages,
five microbatches, tasks that take equally long:

    stage 0   F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
    stage 1   .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
    stage 2   .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4
"""

from collections.abc import Container, Mapping, Sequence

from hetjax.core.orders import Orders, Turns
from hetjax.core.simulation import Lane, Span
from hetjax.core.tasks import Kind, Needs, StageKey, Task


def bounds(orders: Orders) -> dict[StageKey, int]:
    """Of each stage that splits its backwards the most microbatches of which the forward is done and the weights'
    gradients are not; several stages on the same devices have so many together, or less."""
    most = _most(orders)
    return {key: min(most[key[0]], orders.num) for key, node in orders.nodes.items() if node.splits}


def needs(graph: Needs) -> dict[Task, list[Task]]:
    """Of every half what must have ended."""
    return {task: graph.of(task) for task in graph.of_microbatches() if task.kind is Kind.WEIGHTS}


def lanes(orders: Orders, spans: Mapping[Task, Span]) -> list[Lane]:
    """Those of `orders`, whose simulated `spans` know no halves, with these between the other tasks."""
    most, found = _most(orders), []
    for turns, lane in zip(reversed(orders.turns), orders.lanes, strict=True):
        if _splits(turns):
            mine, late = {node.key for node in turns.stages}, most[turns.module] - orders.ahead(turns)
            order = [task for task in spans if task.stage in mine]
            lane = lane._replace(orders=(_in_turn(order, {n.key for n in turns.stages if n.splits}, late),))
        found.append(lane)
    return found


def _splits(turns: Turns) -> bool:
    return any(node.splits for node in turns.stages)


def _most(orders: Orders) -> dict[str, int]:
    """By module, forwards without their backwards that the lane may have which is furthest ahead."""
    most: dict[str, int] = {}
    for turns in filter(_splits, orders.turns):
        most[turns.module] = max(most.get(turns.module, 0), orders.ahead(turns))
    return most


def _in_turn(order: Sequence[Task], splits: Container[StageKey], late: int) -> list[Task]:
    """A lane's tasks with the halves between them, of which so many are left for later."""
    found: list[Task] = []
    left: list[Task] = []
    for task in order:
        found.append(task)
        if task.kind is Kind.BACKWARD and task.stage in splits:
            left.append(task._replace(kind=Kind.WEIGHTS))
            if len(left) > late:
                found.append(left.pop(0))
    return found + left
