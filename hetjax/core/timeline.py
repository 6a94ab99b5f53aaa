"""When the tasks of a step really began and ended, seen by threads that wait for their results."""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Mapping

import jax

from hetjax.core.simulation import Span, idle
from hetjax.core.tasks import COMPUTING, Kind, Needs, StageKey, Task

MICRO = 1_000_000


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A recorded step: `spans` of its computing tasks in microseconds from its begin, `crossings` of boundaries from
    the end of what gives to the arrival. `devices`: this process's of each stage. `makespan`: to the new parameters."""

    devices: Mapping[StageKey, frozenset[int]]
    spans: Mapping[Task, Span]
    crossings: Mapping[Task, Span]
    makespan: int

    @property
    def bubble(self) -> float:
        """The share of these devices' time in which they compute nothing."""
        return idle(self.spans, self.devices, self.makespan)

    def device_seconds(self, module: str) -> float:
        """That devices work for the module, each for itself."""
        mine = [(task, span) for task, span in self.spans.items() if task.stage[0] == module]
        return sum((span.end - span.begin) * len(self.devices[task.stage]) for task, span in mine) / MICRO


class Recorder:
    """Sees the tasks of one step. Each stage, and each way between two, has a thread that waits for what comes of its
    tasks, in their order, and notes the time: jax tells nobody when a device is done."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._threads: dict[tuple, threading.Thread] = {}
        self._queues: dict[tuple, queue.SimpleQueue] = {}  # lighter than an executor's futures
        self._handed: dict[Task, int] = {}
        self._ends: dict[Task, int] = {}

    def see(self, task: Task, result: jax.Array) -> None:
        """The host has handed out a task, whose end is the arrival of `result`. It is kept until then."""
        where = (task.stage, task.to)
        if where not in self._queues:
            self._queues[where] = queue.SimpleQueue()
            self._threads[where] = threading.Thread(target=self._watch, args=(self._queues[where],), daemon=True)
            self._threads[where].start()
        self._handed[task] = self._now()
        self._queues[where].put((task, result))

    def close(self) -> None:
        """No more will come: the threads end once they have seen what did."""
        for waiting in self._queues.values():
            waiting.put(None)

    def timeline(self, needs: Needs, devices: Mapping[StageKey, frozenset[int]]) -> Timeline:
        """What was seen, now that all of the step is over. `devices`: this process's of each stage."""
        makespan, ends = self._now(), self._ends
        self.close()
        for thread in self._threads.values():
            thread.join()
        makespan = max(makespan, *ends.values())  # the last end may be noted a little late
        spans: dict[Task, Span] = {}
        free = dict.fromkeys(frozenset().union(*devices.values()), 0)
        for task in sorted((t for t in ends if t.kind in COMPUTING), key=ends.__getitem__):
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

    def _watch(self, waiting: queue.SimpleQueue) -> None:
        while (handed := waiting.get()) is not None:
            task, result = handed
            with contextlib.suppress(Exception):  # the step's own thread meets it too
                result.block_until_ready()
            self._ends[task] = self._now()

    def _now(self) -> int:
        return round((time.perf_counter() - self._begin) * MICRO)
