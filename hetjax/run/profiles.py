"""How a step is taken: plainly, recorded (`timelines.py`), or profiled by jax.

DIR/profiles/step-N has the names of the tasks on the thread that hands them out. Each of several processes profiles its
own devices, the others than the first in step-N-process-K."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax

from hetjax.core.finish import Outcome
from hetjax.core.trainer import Microbatches, State, Trainer
from hetjax.run import metrics, timelines
from hetjax.run.experiment import Experiment

FOLDER = "profiles"
Take = Callable[[State, Microbatches], tuple[State, Outcome]]


def taken(run: Experiment, trainer: Trainer, workdir: Path, writer: metrics.Writer, waited: float, number: int) -> Take:
    """How step `number`, which `waited` seconds for its data, is done: recorded, profiled, or both, as the run asks."""
    how: Take = trainer.step
    if number in run.timeline_steps:
        how = functools.partial(timelines.step, trainer, workdir=workdir, writer=writer, waited=waited)
    if number in run.profile_steps:
        how = functools.partial(step, trainer, workdir=workdir, take=how)
    return how


def missed(run: Experiment, workdir: Path, step: int) -> list[str]:
    """A line for each setting that asks for steps up to `step`, the last one made, that nobody recorded."""
    asked = {"timeline_steps": (run.timeline_steps, timelines.FOLDER), "profile_steps": (run.profile_steps, FOLDER)}
    found = []
    for setting, (numbers, folder) in asked.items():
        recorded = {path.name.removesuffix(".json") for path in (workdir / folder).glob("*")}
        if gone := [str(n) for n in numbers if n <= step and timelines.name_of(n) not in recorded]:
            found.append(f"{setting}: the run has made step {step} already, so {', '.join(gone)} will not be recorded")
    return found


def step(
    trainer: Trainer,
    state: State,
    microbatches: Microbatches,
    workdir: Path,
    take: Take,
) -> tuple[State, Outcome]:
    """A step, as `take` takes it, of which jax writes a profile between two moments without work."""
    folder = workdir / FOLDER / timelines.name_of(state.step + 1)
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
