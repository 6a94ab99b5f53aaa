"""Where the host's walk over the tasks is, and what the stages' devices have not done yet: for whoever asks why a run
does not go on. The thread that walks writes it, any other may read it."""

import collections
from collections.abc import Sequence
from typing import Any

from hetjax.core.tasks import Kind, StageKey, Task
from hetjax.core.wiring import Wiring

WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.WEIGHTS: "weights' gradients",
    Kind.DECIDE: "decision",
}


class Progress:
    """`count` grows with each task and each evaluation. `given`: what stages are at, oldest first."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self.count = 0
        self.given: dict[StageKey, collections.deque[tuple[Task, Any]]] = {
            key: collections.deque() for key in wiring.stages
        }
        self._tasks: Sequence[Task] = ()
        self._place = 0

    def begin(self, tasks: Sequence[Task]) -> None:
        """The thread begins to hand out these tasks."""
        self._tasks, self._place = tasks, 0

    def handed_out(self) -> None:
        """A task is through the host's hands."""
        self.count += 1
        self._place += 1

    def lines(self) -> list[str]:
        """What the host's thread waits for, and then each stage of which this process has a device, or a result."""
        if not self._tasks:
            return []
        at, total = self._place, len(self._tasks)
        host = f"at task {at + 1} of {total}, {told(self._tasks[at])}" if at < total else f"behind all {total} tasks"
        stages = [key for key, given in self.given.items() if given or key in self._wiring.mine]
        return [f"the host's thread is {host}", *map(self._of_stage, stages)]

    def _of_stage(self, key: StageKey) -> str:
        given = tuple(self.given[key])
        unfinished = [task for task, done in given if not done.is_ready()]
        if unfinished:
            return f"{self._name(key)} waits for {told(unfinished[0])}{self._takes(unfinished[0])}"
        next_ones = [task for task in self._tasks[self._place :] if task.stage == key and task.kind is not Kind.DECIDE]
        behind = f"; next is {told(next_ones[0])}{self._takes(next_ones[0])}" if next_ones else ""
        return f"{self._name(key)} has done what it was given{behind}"

    def _takes(self, task: Task) -> str:
        """Where what a task takes comes from."""
        if task.kind is Kind.FORWARD:
            sources = [link.source for link in self._wiring.sources_of(task.stage, task.microbatch)]
        elif task.kind is Kind.BACKWARD:
            sources = [link.target for link in self._wiring.links[task.stage]]
        else:
            sources = [k for k, s in self._wiring.stages.items() if s.parameters.trains and task.kind is Kind.DECIDE]
        return f", which takes what {' and '.join(map(self._name, sources))} gives" if sources else ""

    def _name(self, key: StageKey) -> str:
        numbers = sorted({d.process_index for d in self._wiring.stages[key].plan.mesh.devices.flat})
        return f"{key[0]}/{key[1]} (process {', '.join(map(str, numbers))})"


def told(task: Task) -> str:
    """A task in words."""
    what, (module, index) = WORDS.get(task.kind, task.kind.value), task.stage
    to = "" if task.to is None else f" -> {task.to[0]}/{task.to[1]}"
    which = "" if task.microbatch < 0 else f", microbatch {task.microbatch}"
    return f"{what} of {module}/{index}{to}{which}"
