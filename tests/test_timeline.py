"""A recorded step is the step, and says when each task began and ended."""

import gzip
import itertools
import json
import threading
import time
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from PIL import Image

from hetjax.core import processes
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.progress import told
from hetjax.core.tasks import COMPUTING, Kind, Needs, StageNode, Task
from hetjax.core.timeline import Recorder
from hetjax.core.trainer import Trainer
from hetjax.run import profiles, timelines

BOX = "{http://www.w3.org/2000/svg}g"


class Result:
    """What comes of a task, once it is told to."""

    def __init__(self) -> None:
        self.there = threading.Event()

    def block_until_ready(self) -> None:
        self.there.wait(10)


def test_a_task_begins_when_its_devices_are_free_and_its_inputs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(Recorder, "_now", lambda recorder: next(clock))
    nodes = [
        StageNode("v", 0, frozenset({0}), backward=False, upstream=()),
        StageNode("l", 0, frozenset({0, 1}), backward=False, upstream=(("v", 0),)),
    ]
    v0, v1, l0 = Task(Kind.FORWARD, ("v", 0), 0), Task(Kind.FORWARD, ("v", 0), 1), Task(Kind.FORWARD, ("l", 0), 0)
    crosses = Task(Kind.BOUNDARY, ("v", 0), 0, ("l", 0))
    recorder, results = Recorder(), {task: Result() for task in (v0, crosses, v1, l0)}
    for task, result in results.items():  # handed out at 0 to 3
        recorder.see(task, result)
    for task, result in results.items():  # through at 4 to 7, each when it is told to
        result.there.set()
        while task not in recorder._ends:
            time.sleep(0.001)
    found = recorder.timeline(Needs(nodes, 2), {node.key: node.devices for node in nodes})
    assert found.spans == {v0: (0, 4), v1: (4, 6), l0: (6, 7)}  # the last waits for device 0, not for its input of 5
    assert found.crossings == {crosses: (4, 5)} and found.makespan == 8
    assert found.bubble == 1 - (4 + 2 + 2 * 1) / 16 and found.device_seconds("l") == 2e-6


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """An encoder that shares a device with the second of two stages."""
    graph = tiny.graph(Layout(pp=2, devices="0-1"), {"vision": Layout(devices="1")}, jnp.float32)
    config = OptimizerConfig(name="sgd", learning_rate=0.1)
    return tiny.trainer(graph, tiny.Shape(microbatches=3), config, dtype=jnp.float32, schedule="zerobubble")


def test_a_recorded_step_is_the_step(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    microbatches = tiny.microbatches(tiny.Shape(microbatches=3), ("vision",), seed=0)
    plain, _ = trainer.step(trainer.init(), microbatches)
    written: list[tuple[int, Any]] = []
    writer: Any = types.SimpleNamespace(write=lambda *line: written.append(line))
    recorded, _ = timelines.step(trainer, trainer.init(), microbatches, tmp_path, writer, 0.25)
    jax.tree.map(np.testing.assert_array_equal, plain.params, recorded.params)
    assert trainer.pipeline.recorder is None
    assert "recorded step 1, " in capsys.readouterr().out
    folder = tmp_path / timelines.FOLDER
    tree = ElementTree.parse(folder / "step-1.svg").getroot()
    told_twice = len(trainer.pipeline.schedule.forecast.spans)
    ends, legend = 2 * 3, 3
    assert len(tree.findall(BOX)) == 2 * told_twice + ends + legend
    assert Image.open(folder / "step-1.png").width == 2 * int(tree.attrib["width"])
    ((step, found),) = written
    names = ["seconds", "idle", "idle_planned", "seconds/vision", "seconds/llm", "data_wait_seconds"]
    assert found["timeline/data_wait_seconds"] == 0.25
    assert step == 1 and list(found) == [f"timeline/{name}" for name in names]
    assert found["timeline/idle_planned"] == trainer.pipeline.schedule.forecast.bubble
    worked = (found["timeline/seconds/vision"] + 2 * found["timeline/seconds/llm"]) / found["timeline/seconds"]
    assert found["timeline/idle"] == pytest.approx(1 - worked / 2)
    events = json.loads((folder / "step-1.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(tracks.values()) == {
        *("device 0", "device 1", "vision/0 to llm/0", "llm/0 to vision/0", "llm/0 to llm/1", "llm/1 to llm/0")
    }
    of_device = lambda name: [e for e in events if e["ph"] == "X" and tracks[e["tid"]] == name]
    for one, other in itertools.pairwise(sorted(of_device("device 1"), key=lambda e: e["ts"])):
        assert one["ts"] + one["dur"] <= other["ts"]


def test_what_is_recorded_keeps_to_what_tasks_need(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    microbatches = tiny.microbatches(tiny.Shape(microbatches=3), ("vision",), seed=0)
    _, _, found = trainer.recorded(trainer.init(), microbatches)
    spans: dict[Task, Any] = {**found.spans, **found.crossings}
    assert set(spans) == {t for t in trainer.pipeline.schedule.order if t.kind in (*COMPUTING, Kind.BOUNDARY)}
    needs = Needs(trainer.pipeline.nodes, 3)
    for task, span in found.spans.items():
        # threads see what happens a little late, so an end may be noted behind that of what followed
        assert all(min(spans[need].end, span.end) <= span.begin for need in needs.of(task) if need in spans)
        assert 0 <= span.begin <= span.end <= found.makespan
    monkeypatch.setattr(timelines.flops, "peak_flops", lambda kind: 1e9)
    numbers, computed = timelines.numbers(trainer, found), trainer.step_flops()
    for name, devices in {"vision": 1, "llm": 2}.items():
        rate = computed[name] / (devices * numbers[f"timeline/seconds/{name}"])
        assert numbers[f"timeline/mfu/{name}"] == pytest.approx(rate / 1e9)


def test_of_a_stage_that_processes_share_each_counts_its_own_devices(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    microbatches = tiny.microbatches(tiny.Shape(microbatches=3), ("vision",), seed=0)
    graph = tiny.graph(Layout(dp=2, devices="0-1"), {"vision": Layout(devices="1")}, jnp.float32)
    shared = tiny.trainer(graph, tiny.Shape(microbatches=3), trainer.spec.optimizer, dtype=jnp.float32)
    monkeypatch.setattr(processes, "own", lambda devices: frozenset({1}))
    _, _, found = shared.recorded(shared.init(), microbatches)
    assert found.devices == {("vision", 0): {1}, ("llm", 0): {1}} and 0 <= found.bubble < 1
    spans = [span for task, span in found.spans.items() if task.stage[0] == "llm"]
    assert found.device_seconds("llm") == pytest.approx(sum(span.end - span.begin for span in spans) / 1e6)


def test_a_profiled_step_is_the_step_with_the_name_of_each_task(trainer: Trainer, tmp_path: Path) -> None:
    microbatches = tiny.microbatches(tiny.Shape(microbatches=3), ("vision",), seed=0)
    plain, _ = trainer.step(trainer.init(), microbatches)
    found, _ = profiles.step(trainer, trainer.init(), microbatches, tmp_path, trainer.step)
    jax.tree.map(np.testing.assert_array_equal, plain.params, found.params)
    (trace,) = tmp_path.glob("profiles/step-1/**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {names.count(told(task)) for task in trainer.pipeline.schedule.order} == {1}
    assert [event["args"]["step_num"] for event in events if event.get("name") == "step"] == ["1"]
    assert not trainer.pipeline.annotates


def test_a_profile_tells_programs_apart_by_stage_and_kind(trainer: Trainer) -> None:
    for (module, number), stage in trainer.pipeline.stages.items():
        for kind, program in stage.programs.items():
            assert program.as_text().startswith(f"HloModule jit_{module}_{number}_{kind},")


def test_the_run_records_and_profiles_the_steps_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        def step(self, *_: object) -> list[str]:
            return []

    monkeypatch.setattr(timelines, "step", lambda trainer, *_, workdir, writer, waited: ["recorded", *trainer.step()])
    monkeypatch.setattr(profiles, "step", lambda trainer, *_, workdir, take: ["profiled", *take()])
    run = runs.load(runs.write(tmp_path), runs.settings(timeline_steps=[2, 4], profile_steps=[3, 4]))
    taken: Any = [profiles.taken(run, Plain(), tmp_path, None, 0.0, step)() for step in (1, 2, 3, 4)]  # type: ignore[arg-type]
    assert taken == [[], ["recorded"], ["profiled"], ["profiled", "recorded"]]
    assert not profiles.missed(run, tmp_path, 1)
    (tmp_path / timelines.FOLDER).mkdir()
    (tmp_path / timelines.FOLDER / "step-2.json").touch()
    (gone,) = profiles.missed(run, tmp_path, 3)
    assert gone == "profile_steps: the run has made step 3 already, so 3 will not be recorded"


@pytest.mark.parametrize("name", ["timeline_steps", "profile_steps"])
@pytest.mark.parametrize("steps", [[0], [3, 1001]])
def test_a_step_that_the_run_does_not_have_is_refused(name: str, steps: list[int], tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    with pytest.raises(ValueError, match=f"{name} names {steps[-1]}; the run has steps 1 to"):
        runs.load(gin, runs.settings(**{name: steps}))
