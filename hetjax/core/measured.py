"""How long each stage really takes for a microbatch, for the simulation of a step."""

import collections
import math
import time
from collections.abc import Mapping

import numpy as np

from hetjax.core.alive import Alive, on_device
from hetjax.core.step import Gradients
from hetjax.core.tasks import OF_MICROBATCHES, Cost, Kind, StageKey, Thing, What
from hetjax.core.timeline import MICRO
from hetjax.core.trainer import Trainer

REPEATS = 4  # the first one warms up


def measured(trainer: Trainer, microbatch: Mapping[str, np.ndarray]) -> dict[StageKey, Cost]:
    """Microseconds of the tasks of this process's stages, each with all devices idle but its own: the least of several
    microbatches, all like this one, of which each replica gets some. The programs are compiled; all processes call it
    alike.

    Holds a state of its own meanwhile."""
    pipeline, state, prepared = trainer.pipeline, trainer.init(), trainer.prepare(microbatch)
    kinds = (*OF_MICROBATCHES, Kind.BOUNDARY)
    once = max(stage.plan.share.replicas for stage in pipeline.stages.values())  # microbatches, until each has one
    tasks = [task for task in pipeline.tasks[0] if 0 <= task.microbatch < once and task.kind in kinds]
    alive = Alive(frozenset(), {})
    for key, weights in state.weights.items():
        alive.begin(Thing(What.WEIGHTS, key), on_device(weights))
    least: dict[tuple[Kind, StageKey], float] = collections.defaultdict(lambda: math.inf)
    accumulators = dict(state.acc)
    for _ in range(REPEATS):
        step = Gradients(pipeline.finish, pipeline.flags, alive, [prepared] * once, accumulators, prepared.target_count)
        for task in tasks:
            start = time.perf_counter()
            if (done := step.doing[task.kind](task)) is not None:
                done.block_until_ready()
            what = task.kind, task.stage
            least[what] = min(least[what], time.perf_counter() - start)

    def cost(key: StageKey) -> Cost:
        forward, backward, weights = (round(least.get((kind, key), 0) * MICRO) for kind in OF_MICROBATCHES)
        return Cost(max(forward, 1), max(backward, 1) + weights, weights)

    return {key: cost(key) for key in pipeline.stages_here}
