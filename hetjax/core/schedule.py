"""All tasks of a step in one static order. Pure Python; imports no jax.

Forwards and backwards are those of a simulation of the devices (`simulation.py`), by their begin. Two stages, three
microbatches, 1F1B:

    stage 0   F0 F1 .  .  B0 F2 .  .  B1 .  .  B2
    stage 1   .  F0 B0 .  F1 B1 .  .  F2 B2

A boundary stands where its producer ends in the simulation: earlier, the devices that receive would wait for it with
other work in hand; later, it would stand behind the sender's next task.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from hetjax.core.forecast import Forecast, forecast
from hetjax.core.offload import Moment, moments, with_moves
from hetjax.core.simulation import Span
from hetjax.core.tasks import Cost, Kind, Needs, StageKey, StageNode, Task, Thing


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`gradients`: every task up to the finished gradients, in order. `update`: those behind them.

    `home`: what of the stages lies on the host between steps. `moments`: what is where while a task computes, each
    once. `forecast`: what the simulation says of it.
    """

    gradients: tuple[Task, ...]
    update: tuple[Task, ...]
    home: frozenset[Thing]
    moments: tuple[Moment, ...]
    forecast: Forecast

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
    costs: Mapping[StageKey, Cost] | None = None,
) -> Schedule:
    """The schedule of one step; `nodes` and `ties` as in `Needs`, all else and what it raises as in `forecast`."""
    found = forecast(nodes, num_microbatches, kind=kind, encoder_window=encoder_window, costs=costs)
    needs = Needs(nodes, num_microbatches, ties)
    tasks = [*_with_ends(found.spans, needs), *needs.behind_gradients()]
    tasks, home = with_moves(tasks, needs)
    decide, held = tasks.index(needs.decide), tuple(dict.fromkeys(moments(tasks, needs, home)))
    return Schedule(tuple(tasks[:decide]), tuple(tasks[decide:]), home, held, found)


def _with_ends(spans: Mapping[Task, Span], needs: Needs) -> list[Task]:
    """The tasks of microbatches with what follows them, by simulated time: boundaries first, then finished stages."""
    last = {task.stage: task for task in spans if task.kind in (Kind.BACKWARD, Kind.WEIGHTS)}
    events = []
    for task, span in spans.items():
        events += [(span.end, 0, t) for t in needs.boundaries_behind(task)]
        if last.get(task.stage) == task:
            events += [(span.end, 1, t) for t in needs.finished(task.stage)]
        events.append((span.begin, 2, task))
    return [task for _, _, task in sorted(events, key=lambda event: event[:2])]
