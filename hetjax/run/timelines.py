"""Steps that are recorded: DIR/timelines/step-N.svg, planned against real, and step-N.json, which opens in Perfetto.

Each of several processes writes of its own devices, the others than the first step-N-process-K."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hetjax.core.finish import Outcome
from hetjax.core.progress import told
from hetjax.core.tasks import Task
from hetjax.core.timeline import Timeline
from hetjax.core.trainer import Microbatches, State, Trainer
from hetjax.run import chart, cluster

FOLDER = "timelines"


def step(trainer: Trainer, state: State, microbatches: Microbatches, workdir: Path) -> tuple[State, Outcome]:
    """A step of `trainer` that is recorded in `workdir`."""
    state, outcome, timeline = trainer.recorded(state, microbatches)
    name = f"step-{state.step}{cluster.of_others()}"
    planned = trainer.pipeline.schedule.forecast
    real = f"step {state.step}, {timeline.makespan / 1e6:.3f} s: devices idle {timeline.bubble:.1%}"
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    pictures: dict[str, chart.Step] = {f"planned: {trainer.pipeline.promise()}": planned, real: timeline}
    (folder / f"{name}.svg").write_text(chart.svg(pictures), encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps({"traceEvents": list(_events(timeline))}))
    here = dict.fromkeys(module for module, _ in timeline.devices)
    modules = ", ".join(f"{module} {timeline.seconds(module):.3f} s" for module in here)
    others = "; of this process's devices, others beside it" if jax.process_count() > 1 else ""
    print(f"recorded {real}; stages of {modules}: {folder / name}.svg and .json{others}", flush=True)
    return state, outcome


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """As the Trace Event Format has them: a track for each group of devices, and for each way between two stages."""
    tracks: dict[str, int] = {}

    def event(task: Task, track: str, span: Any) -> dict[str, Any]:
        where = tracks.setdefault(track, len(tracks))
        return {"name": told(task), "ph": "X", "ts": span.begin, "dur": span.end - span.begin, "pid": 0, "tid": where}

    for row in chart.rows(timeline):
        yield from (event(task, row.name, span) for task, span in row.spans.items())
    for task, span in timeline.crossings.items():
        module, stage = task.to or task.stage
        yield event(task, f"{task.stage[0]}/{task.stage[1]} to {module}/{stage}", span)
    for track, number in tracks.items():
        yield {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": track}}
