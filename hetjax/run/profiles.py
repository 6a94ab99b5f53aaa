"""Steps that jax profiles: DIR/profiles/step-N, with the names of the tasks on the thread that hands them out.

Each of several processes profiles its own devices, the others than the first in step-N-process-K."""

from collections.abc import Callable
from pathlib import Path

import jax

from hetjax.core.finish import Outcome
from hetjax.core.trainer import Microbatches, State, Trainer
from hetjax.run import cluster

FOLDER = "profiles"


def step(
    trainer: Trainer,
    state: State,
    microbatches: Microbatches,
    workdir: Path,
    take: Callable[[State, Microbatches], tuple[State, Outcome]],
) -> tuple[State, Outcome]:
    """A step, as `take` takes it, of which jax writes a profile between two moments without work."""
    folder = workdir / FOLDER / f"step-{state.step + 1}{cluster.of_others()}"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a function would hide the tasks, and slow the step down
    jax.block_until_ready(state.weights)
    trainer.pipeline.annotates = True
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    try:
        with jax.profiler.StepTraceAnnotation("step", step_num=state.step + 1):
            state, outcome = take(state, microbatches)
            jax.block_until_ready(state.weights)
    finally:
        jax.profiler.stop_trace()
        trainer.pipeline.annotates = False
    print(f"profiled step {state.step}: {folder}", flush=True)
    return state, outcome
