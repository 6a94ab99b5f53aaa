"""What a schedule promises of a step: how long it takes, who waits, and what is kept meanwhile. Imports no jax."""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

from hetjax.core import halves
from hetjax.core.filling import filled
from hetjax.core.orders import Orders
from hetjax.core.simulation import Span, idle, simulate
from hetjax.core.tasks import ZERO_BUBBLE, Cost, Kind, Needs, StageKey, StageNode, Task

KINDS = ("1f1b", "gpipe", ZERO_BUBBLE)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The tasks of a step's microbatches in simulated time, whose unit is that of the costs.

    `devices`: of each stage. `spans`: the tasks by their begin. `shortest`: the longest chain of tasks that need each
    other, which no schedule is faster than. `in_flight`: per stage, the most microbatches whose forward is done and
    backward is not, never more than `bounds` (see `Orders`). `held`: of stages that split their backwards, the most
    whose forward is done and the weights' gradients are not, never more than `held_bounds` (see `halves.py`).
    `text_only`: the time of the step without encoders.
    """

    devices: Mapping[StageKey, frozenset[int]]
    spans: Mapping[Task, Span]
    shortest: int
    in_flight: Mapping[StageKey, int]
    bounds: Mapping[StageKey, int]
    held: Mapping[StageKey, int]
    held_bounds: Mapping[StageKey, int]
    text_only: int

    @property
    def makespan(self) -> int:
        """From the first task's begin to the last one's end."""
        return _end(self.spans)

    @property
    def bubble(self) -> float:
        """The share of all devices' time in which they have no task."""
        return idle(self.spans, self.devices, self.makespan)

    def works(self, key: StageKey) -> float:
        """The share of the step in which a stage has a task."""
        return sum(span.end - span.begin for task, span in self.spans.items() if task.stage == key) / self.makespan

    @property
    def throughput(self) -> float:
        """The share that encoders leave of the throughput that the language model alone has."""
        return self.text_only / self.makespan

    def numbers(self) -> dict[str, Any]:
        """What is promised, for a record of the run."""
        named = lambda counts: {f"{module}/{stage}": count for (module, stage), count in counts.items()}
        return {
            "idle": self.bubble,
            "longest_chain": self.shortest / self.makespan,
            "text_only_throughput": self.throughput,
            "in_flight": named(self.in_flight),
            "in_flight_at_most": named(self.bounds),
        }

    def __str__(self) -> str:
        split = f", with those whose weights' gradients are to come {_listed(self.held)}" if self.held else ""
        return (
            f"devices idle {self.bubble:.1%}, longest chain {self.shortest / self.makespan:.1%} of the step, "
            f"{self.throughput:.1%} of text-only throughput; microbatches in flight "
            f"{_listed(self.in_flight)}{split}"
        )


def _listed(counts: Mapping[StageKey, int]) -> str:
    """Of each module that has any, the counts of its stages."""
    found: dict[str, list[str]] = {module: [module] for (module, _), n in counts.items() if n}
    for (module, _), n in counts.items():
        found.get(module, []).append(str(n))
    return ", ".join(map(" ".join, found.values()))


def forecast(
    nodes: Sequence[StageNode],
    num_microbatches: int,
    *,
    kind: str = "1f1b",
    encoder_window: int | None = None,
    costs: Mapping[StageKey, Cost] | None = None,
) -> Forecast:
    """Simulates a step of `nodes` as in `Needs`. `encoder_window` None: colocated encoders run ahead over the whole
    step. `costs` None: a backward takes two forwards, everywhere, and each half of one takes one.

    Raises ValueError for an unknown kind or a window outside of 1 to `num_microbatches`.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule={kind!r}; it must be one of {', '.join(KINDS)}")
    window = num_microbatches if encoder_window is None else encoder_window
    if not 1 <= window <= num_microbatches:
        raise ValueError(
            f"encoder_window={window} is outside of 1 to num_microbatches={num_microbatches}; None means all of them"
        )
    costs = {node.key: Cost(weights=int(node.splits)) for node in nodes} if costs is None else costs
    sink = nodes[-1].module

    def step(of_step: Sequence[StageNode]) -> tuple[Orders, dict[Task, Span]]:
        orders = Orders(Needs(of_step, num_microbatches), num_microbatches, kind=kind, window=window)
        others = _only(of_step, {node.module for node in of_step if node.share.replicas == 1})
        if len(others) < len(of_step):
            return orders, filled(orders, step(others)[1], costs)
        spans = simulate(orders.lanes, orders.needs(), costs)
        if later := halves.needs(orders.graph):
            spans = simulate(halves.lanes(orders, spans), orders.needs() | later, costs)
        return orders, spans

    orders, spans = step(nodes)
    alone = step(_only(nodes, {sink}))[1]
    devices = {node.key: node.devices for node in nodes}
    shortest = _longest_chain(orders.graph, spans)
    in_flight = _most(spans, {node.key: Kind.BACKWARD for node in nodes if node.backward})
    held = _most(spans, {node.key: Kind.WEIGHTS for node in nodes if node.splits})
    kept = {node.key: 0 for node in nodes} | in_flight
    return Forecast(devices, spans, shortest, kept, orders.bounds, held, halves.bounds(orders), _end(alone))


def _only(nodes: Sequence[StageNode], modules: Container[str]) -> list[StageNode]:
    """The stages of some modules, with the tasks that they have, and nothing else that enters them."""
    mine = [node for node in nodes if node.module in modules]
    return [dataclasses.replace(n, upstream=tuple(k for k in n.upstream if k[0] in modules)) for n in mine]


def _end(spans: Mapping[Task, Span]) -> int:
    return max(span.end for span in spans.values())


def _longest_chain(needs: Needs, spans: Mapping[Task, Span]) -> int:
    """Of tasks that take each other's results, as if each had devices of its own; needs come before what needs them."""
    end: dict[Task, int] = {}
    for task, span in spans.items():
        end[task] = span.end - span.begin + max((end[need] for need in needs.computed(task)), default=0)
    return max(end.values())


def _most(spans: Mapping[Task, Span], ends: Mapping[StageKey, Kind]) -> dict[StageKey, int]:
    """Of some stages the most microbatches of which the forward is done and the task of this kind is not."""
    most = dict.fromkeys(ends, 0)
    alive = dict(most)
    for task in spans:
        if task.stage in ends:
            alive[task.stage] += (task.kind is Kind.FORWARD) - (task.kind is ends[task.stage])
            most[task.stage] = max(most[task.stage], alive[task.stage])
    return most
