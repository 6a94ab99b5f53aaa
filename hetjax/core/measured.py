"""How long each stage really takes for a microbatch, for the simulation of a step."""

import math
import time
from collections.abc import Mapping

import numpy as np

from hetjax.core.alive import Alive, on_device
from hetjax.core.step import Gradients
from hetjax.core.tasks import Cost, Kind, StageKey, Task, Thing, What
from hetjax.core.timeline import MICRO
from hetjax.core.trainer import Trainer

REPEATS = 4  # the first one warms up


def measured(trainer: Trainer, microbatch: Mapping[str, np.ndarray]) -> dict[StageKey, Cost]:
    """Microseconds of the tasks of this process's stages, each with all devices idle but its own: the least of several
    microbatches, all like this one. The programs are compiled; all processes call it alike.

    Holds a state of its own meanwhile."""
    pipeline, state, prepared = trainer.pipeline, trainer.init(), trainer.prepare(microbatch)
    kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.BOUNDARY)
    tasks = [task for task in pipeline.tasks[0] if task.microbatch == 0 and task.kind in kinds]
    alive = Alive(frozenset(), {})
    for key, weights in state.weights.items():
        alive.begin(Thing(What.WEIGHTS, key), on_device(weights))
    least: dict[Task, float] = dict.fromkeys(tasks, math.inf)
    accumulators = dict(state.acc)
    for _ in range(REPEATS):
        step = Gradients(pipeline.finish, pipeline.flags, alive, [prepared], accumulators, prepared.target_count)
        for task in tasks:
            start = time.perf_counter()
            if (done := step.doing[task.kind](task)) is not None:
                done.block_until_ready()
            least[task] = min(least[task], time.perf_counter() - start)
    taken = {task: max(round(seconds * MICRO), 1) for task, seconds in least.items()}
    of = lambda kind, key: taken.get(Task(kind, key, 0), 1)
    return {key: Cost(of(Kind.FORWARD, key), of(Kind.BACKWARD, key)) for key in pipeline.stages_here}
