"""A recorded step is the step, and says when each task began and ended."""

import itertools
import json
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.tasks import OF_MICROBATCHES, Kind, Needs, StageNode, Task
from hetjax.core.timeline import Recorder
from hetjax.core.trainer import Trainer
from hetjax.run import timelines

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
        recorder._ends[task].result(10)
    found = recorder.timeline(Needs(nodes, 2), {node.key: node.devices for node in nodes})
    assert found.spans == {v0: (0, 4), v1: (4, 6), l0: (6, 7)}  # the last waits for device 0, not for its input of 5
    assert found.crossings == {crosses: (4, 5)} and found.makespan == 8
    assert found.bubble == 1 - (4 + 2 + 2 * 1) / 16 and found.seconds("v") == 6e-6


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """An encoder that shares a device with the second of two stages."""
    graph = tiny.graph(Layout(pp=2, devices="0-1"), {"vision": Layout(devices="1")}, jnp.float32)
    config = OptimizerConfig(name="sgd", learning_rate=0.1)
    return tiny.trainer(graph, tiny.Shape(microbatches=3), config, dtype=jnp.float32, schedule="zerobubble")


def test_a_recorded_step_is_the_step(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    microbatches = tiny.microbatches(tiny.Shape(microbatches=3), ("vision",), seed=0)
    plain, _ = trainer.step(trainer.init(), microbatches)
    recorded, _ = timelines.step(trainer, trainer.init(), microbatches, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, plain.params, recorded.params)
    assert trainer.pipeline.recorder is None
    assert "recorded step 1, " in capsys.readouterr().out
    folder = tmp_path / timelines.FOLDER
    tree = ElementTree.parse(folder / "step-1.svg").getroot()
    assert len(tree.findall(BOX)) == 2 * len(trainer.pipeline.schedule.forecast.spans)
    events = json.loads((folder / "step-1.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(tracks.values()) == {
        *("device 0", "device 1", "vision/0 to llm/0", "llm/0 to vision/0", "llm/0 to llm/1", "llm/1 to llm/0")
    }
    of_device = lambda name: [e for e in events if e["ph"] == "X" and tracks[e["tid"]] == name]
    for one, other in itertools.pairwise(sorted(of_device("device 1"), key=lambda e: e["ts"])):
        assert one["ts"] + one["dur"] <= other["ts"]


def test_what_is_recorded_keeps_to_what_tasks_need(trainer: Trainer) -> None:
    microbatches = tiny.microbatches(tiny.Shape(microbatches=3), ("vision",), seed=0)
    _, _, found = trainer.recorded(trainer.init(), microbatches)
    spans: dict[Task, Any] = {**found.spans, **found.crossings}
    order = trainer.pipeline.schedule.gradients
    assert set(spans) == {t for t in order if t.kind in (*OF_MICROBATCHES, Kind.BOUNDARY)}
    needs = Needs(trainer.pipeline.nodes, 3)
    for task, span in found.spans.items():
        # threads see what happens a little late, so an end may be noted behind that of what followed
        assert all(min(spans[need].end, span.end) <= span.begin for need in needs.of(task))
        assert 0 <= span.begin <= span.end <= found.makespan


@pytest.mark.parametrize("steps", [[0], [3, 1001]])
def test_a_step_that_the_run_does_not_have_is_refused(steps: list[int], tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    with pytest.raises(ValueError, match=f"timeline_steps names {steps[-1]}; the run has steps 1 to"):
        runs.load(gin, runs.settings(timeline_steps=steps))
