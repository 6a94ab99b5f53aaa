"""Steps that are recorded: DIR/timelines/step-N.svg and .png, planned against real, and step-N.json, which opens in
Perfetto.

Each of several processes writes of its own devices, the others than the first step-N-process-K."""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hetjax.core import flops
from hetjax.core.finish import Outcome
from hetjax.core.progress import told
from hetjax.core.tasks import Task
from hetjax.core.timeline import MICRO, Timeline
from hetjax.core.trainer import Microbatches, State, Trainer
from hetjax.run import chart, cluster, metrics

FOLDER = "timelines"


def step(
    trainer: Trainer, state: State, microbatches: Microbatches, workdir: Path, writer: metrics.Writer, waited: float
) -> tuple[State, Outcome]:
    """A step of `trainer` that is recorded in `workdir`, and its numbers in `writer`; it `waited` seconds for data."""
    state, outcome, timeline = trainer.recorded(state, microbatches)
    found = numbers(trainer, timeline) | {"timeline/data_wait_seconds": waited}
    name = name_of(state.step)
    planned = trainer.pipeline.schedule.forecast
    whose, others = ("this process's ", "; others beside it") if jax.process_count() > 1 else ("", "")
    real = f"step {state.step}, {timeline.makespan / MICRO:.3f} s: {whose}devices idle {timeline.bubble:.1%}"
    real += f", after {waited:.3f} s without data"
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    drawing = chart.draw({f"planned: {trainer.pipeline.promise()}": planned, real: timeline})
    (folder / f"{name}.svg").write_text(drawing.svg(), encoding="utf-8")
    (folder / f"{name}.png").write_bytes(drawing.png())
    (folder / f"{name}.json").write_text(json.dumps({"traceEvents": list(_events(timeline))}))
    print(f"recorded {real}: {folder / name}.svg, .png and .json{others}", flush=True)
    writer.write(state.step, found)
    return state, outcome


def name_of(step: int) -> str:
    """What the files begin with in which this process has a step."""
    return f"step-{step}{cluster.of_others()}"


def numbers(trainer: Trainer, timeline: Timeline) -> dict[str, float]:
    """What the metrics say of a recorded step, from the timelines of all processes, which call it alike: the seconds
    that a module's devices work for it, and what share of their peak that is; the share in which devices are idle."""
    mine = {name: timeline.device_seconds(name) for name, _ in timeline.devices}
    worked: dict[str, float] = collections.defaultdict(float)
    for told_by in map(json.loads, cluster.tell_all(json.dumps(mine))):
        for name, seconds in told_by.items():
            worked[name] += seconds
    seconds, planned = timeline.makespan / MICRO, trainer.pipeline.schedule.forecast
    everywhere = len(frozenset().union(*planned.devices.values())) * seconds
    found = {
        "timeline/seconds": seconds,
        "timeline/idle": 1 - sum(worked.values()) / everywhere,
        "timeline/idle_planned": planned.bubble,
    }
    peak, flops_of = flops.peak_flops(jax.devices()[0].device_kind), trainer.step_flops()
    for name, device_seconds in worked.items():
        held = frozenset().union(*(devices for key, devices in planned.devices.items() if key[0] == name))
        found[f"timeline/seconds/{name}"] = device_seconds / len(held)
        if peak is not None and name in flops_of:
            found[f"timeline/mfu/{name}"] = flops_of[name] / device_seconds / peak
    return found


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
