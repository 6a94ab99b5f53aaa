"""What does the real loop gain by filling? Steps whose encoder works in the holes of the pipeline, beside steps of the
same programs whose encoder works in front of it and behind it.

    python benchmarks/filled.py [--repeats 4] [--micros 60000] [--only WORD ...]

Stages sleep on emulated devices of their own, as in `schedules.py`; steps of both kinds go in turn, and the fastest of
each counts. Exit status 1 if less than four fifths of the simulated gain is measured over all cases.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from unittest import mock

from schedules import Case, built, seconds_of, started

from hetjax.core import forecast
from hetjax.core.layout import Layout
from hetjax.core.orders import Orders
from hetjax.core.pipeline import Pipeline
from hetjax.core.simulation import Span, simulate
from hetjax.core.tasks import Cost, Kind, StageKey, Task

LEAST = 0.8
FOUR, TWO = Layout(pp=4, devices="0-3"), Layout(pp=2, devices="0-1")
ON_FOUR, ON_TWO = Layout(replicas=4, devices="0-3"), Layout(replicas=2, devices="0-1")
CASES = {
    "pp 4, 12 microbatches": Case(FOUR, ON_FOUR, layers=(8, 3), microbatches=12),
    "pp 4, 8 microbatches": Case(FOUR, ON_FOUR, layers=(8, 3), microbatches=8),
    "pp 2, 4 microbatches": Case(TWO, ON_TWO, layers=(8, 2), microbatches=4),
    "pp 4, 12 microbatches, frozen encoder": Case(FOUR, ON_FOUR, frozen=("vision/*",), layers=(8, 3), microbatches=12),
}


def main(argv: Sequence[str]) -> int:
    """Prints a line per case, and the exit status."""
    flags, chosen, _ = started(argv, __doc__, CASES, repeats=4, micros=60_000)
    print(f"load {os.getloadavg()[0]:.1f}\n{'':<42} in front and behind: s   in holes: s   gain, s", flush=True)
    planned = real = 0.0
    for name, case in chosen.items():
        simulated, measured = compared(case, flags.micros, flags.repeats)
        for what, (without, filled) in (("simulated", simulated), ("measured", measured)):
            print(f"{f'{name}, {what}':<55} {without:10.3f} {filled:13.3f} {without - filled:9.3f}", flush=True)
        gains = [without - filled for without, filled in (simulated, measured)]
        planned, real = planned + gains[0], real + gains[1]
        print(f"{'measured over simulated gain':<55} {gains[1] / gains[0] if gains[0] else math.nan:.2f}")
    print(f"over all cases {real / planned if planned else math.nan:.2f}; load {os.getloadavg()[0]:.1f}")
    return int(real < LEAST * planned)


def compared(case: Case, micros: int, repeats: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a step without filling and with it: simulated, and the least of those measured in turn."""
    trainer, microbatches, costs = built(case, micros)
    state, found = trainer.init(), []
    for _ in range(repeats + 1):
        for how in (around, forecast.filled):
            simulated = reschedule(trainer.pipeline, costs, how)
            state, measured = seconds_of(trainer, state, microbatches)
            found.append((simulated, measured))
    without, filled = (list(zip(*found[2 + n :: 2], strict=True)) for n in (0, 1))  # the first ones warm up
    return (without[0][0], filled[0][0]), (min(without[1]), min(filled[1]))


def reschedule(pipeline: Pipeline, costs: Mapping[StageKey, Cost], how: object) -> float:
    """Places replicas by `how` in place of `filling.filled`; the simulated seconds of a step."""
    with mock.patch.object(forecast, "filled", how):
        pipeline.reschedule(costs)
    return pipeline.schedule.forecast.makespan / 1e6


def around(orders: Orders, without: Mapping[Task, Span], costs: Mapping[StageKey, Cost]) -> dict[Task, Span]:
    """A step whose replicas encode all that is theirs before the language model begins, and go back behind it."""
    needs, replicas = orders.needs(), [k for k, node in orders.nodes.items() if node.share.replicas > 1]
    lanes = [lane._replace(fills=False) for lane in orders.lanes]
    for key in replicas:
        for i in orders.graph.microbatches(key):
            needs[Task(Kind.FORWARD, orders.sink[0], 0)].append(Task(Kind.FORWARD, key, i))
            if orders.nodes[key].backward:
                last = orders.sink[0] if orders.nodes[orders.sink[0]].backward else orders.sink[-1]
                needs[Task(Kind.BACKWARD, key, i)].append(Task(Kind.BACKWARD, last, orders.num - 1))
    return simulate(lanes, {task: dict.fromkeys(before) for task, before in needs.items()}, costs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
