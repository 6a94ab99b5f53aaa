"""When the tasks of a step really began and ended, seen by threads that wait for their results."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping

import jax

from hetjax.core.simulation import Span, idle
from hetjax.core.tasks import OF_MICROBATCHES, Kind, Needs, StageKey, Task

MICRO = 1_000_000


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A recorded step: `spans` of the tasks of microbatches in microseconds from its begin, `crossings` of boundaries
    from the end of what gives to the arrival. `devices`: of each stage. `makespan`: to the new parameters."""

    devices: Mapping[StageKey, frozenset[int]]
    spans: Mapping[Task, Span]
    crossings: Mapping[Task, Span]
    makespan: int

    @property
    def bubble(self) -> float:
        """The share of all devices' time in which they have no task of a microbatch."""
        return idle(self.spans, self.devices, self.makespan)

    def seconds(self, module: str) -> float:
        """That the module's stages work, each for itself."""
        mine = [span for task, span in self.spans.items() if task.stage[0] == module]
        return sum(span.end - span.begin for span in mine) / MICRO


class Recorder:
    """Sees the tasks of one step. Each stage, and each way between two, has a thread that waits for what comes of its
    tasks, in their order, and notes the time: jax tells nobody when a device is done."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._threads: dict[tuple, concurrent.futures.ThreadPoolExecutor] = {}
        self._handed: dict[Task, int] = {}
        self._ends: dict[Task, concurrent.futures.Future[int]] = {}

    def see(self, task: Task, result: jax.Array) -> None:
        """The host has handed out a task, whose end is the arrival of `result`. It is kept until then."""
        where = (task.stage, task.to)
        if where not in self._threads:
            self._threads[where] = concurrent.futures.ThreadPoolExecutor(1, "watch")
        self._handed[task] = self._now()
        self._ends[task] = self._threads[where].submit(self._end, result)

    def timeline(self, needs: Needs, devices: Mapping[StageKey, frozenset[int]]) -> Timeline:
        """What was seen, now that all of the step is over."""
        makespan = self._now()
        for thread in self._threads.values():
            thread.shutdown()
        ends = {task: end.result() for task, end in self._ends.items()}
        spans: dict[Task, Span] = {}
        free = dict.fromkeys(frozenset().union(*devices.values()), 0)
        for task in sorted((t for t in ends if t.kind in OF_MICROBATCHES), key=ends.__getitem__):
            came = [ends[need] for need in needs.of(task) if need in ends]
            began = max(self._handed[task], *came, *(free[device] for device in devices[task.stage]))
            spans[task] = Span(min(began, ends[task]), ends[task])
            free |= dict.fromkeys(devices[task.stage], ends[task])
        crossings = {}
        for task in (t for t in ends if t.kind is Kind.BOUNDARY):
            left = max((ends[need] for need in needs.of(task) if need in ends), default=self._handed[task])
            crossings[task] = Span(min(left, ends[task]), ends[task])
        here = {task.stage for task in spans}
        return Timeline({key: ids for key, ids in devices.items() if key in here}, spans, crossings, makespan)

    def _end(self, result: jax.Array) -> int:
        result.block_until_ready()
        return self._now()

    def _now(self) -> int:
        return round((time.perf_counter() - self._begin) * MICRO)
