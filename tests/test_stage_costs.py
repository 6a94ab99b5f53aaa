"""Measured costs: what stages really take, once; the same bits as with FLOPs, and one order for a run that resumes."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from hetjax.core import measured
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.schedule import build_schedule
from hetjax.core.tasks import Cost, Kind, StageKey, StageNode
from hetjax.core.trainer import Trainer
from hetjax.run import stage_costs

SHAPE = tiny.Shape(microbatches=3)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """Two replicas of an encoder, each on the device of one of two stages."""
    graph = tiny.graph(Layout(pp=2, devices="0-1"), {"vision": Layout(replicas=2, devices="0-1")}, jnp.float32)
    config = OptimizerConfig(name="sgd", learning_rate=0.1)
    found = tiny.trainer(graph, SHAPE, config, dtype=jnp.float32)
    found.compile()
    return found


@pytest.fixture
def microbatches() -> list[dict[str, np.ndarray]]:
    return tiny.microbatches(SHAPE, ("vision",), seed=0)


class Late:
    """What comes of a task, a while after it was handed out."""

    def __init__(self, seconds: float) -> None:
        self.there = time.perf_counter() + seconds

    def block_until_ready(self) -> None:
        time.sleep(max(self.there - time.perf_counter(), 0))


def slowed(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, key: StageKey, program: str, seconds: float) -> None:
    """A forward or a backward, whose third output says when it is through, takes so much longer."""
    programs = trainer.pipeline.stages[key].programs
    plain = programs[program]

    def slow(*given: Any) -> tuple:
        first, second, _, *others = plain(*given)
        return first, second, Late(seconds), *others

    monkeypatch.setitem(programs, program, slow)


def test_each_stage_has_its_own_time(trainer: Trainer, microbatches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(trainer, monkeypatch, ("llm", 0), "backward", 0.3)
    slowed(trainer, monkeypatch, ("vision", 0), "forward", 0.2)
    found = measured.measured(trainer, microbatches[0])
    assert found.keys() == {("vision", 0), ("vision", 1), ("llm", 0), ("llm", 1)}
    assert found["llm", 0].backward >= 300_000 and found["vision", 0].forward >= 200_000
    others = [found["llm", 0].forward, *found["llm", 1][:2], found["vision", 0].backward, *found["vision", 1][:2]]
    assert max(others) < 150_000 and min(others) > 1


def test_a_task_that_takes_no_time_still_comes_before_what_follows_it() -> None:
    nodes = [StageNode("llm", n, frozenset({n}), True, (("llm", 0),) * n, Kind.MEASURE, splits=True) for n in (0, 1)]
    order = build_schedule(nodes, 3, kind="zerobubble", costs={node.key: Cost(0, 0, 0) for node in nodes}).order
    for node in nodes:
        mine = [task.kind for task in order if task.stage == node.key and task.kind in (Kind.WEIGHTS, Kind.MEASURE)]
        assert mine == [Kind.WEIGHTS] * 3 + [Kind.MEASURE]


def test_other_costs_order_the_tasks_otherwise_and_give_the_same_bits(trainer: Trainer, microbatches: list) -> None:
    pipeline = trainer.pipeline
    by_flops = pipeline.schedule.order
    first, one = trainer.step(trainer.init(), microbatches)
    pipeline.reschedule({key: Cost(1, 1) if key[0] == "vision" else Cost(50, 7) for key in pipeline.stages})
    other = pipeline.schedule.order
    assert other != by_flops and sorted(map(str, other)) == sorted(map(str, by_flops))
    assert pipeline.tasks == (pipeline.schedule.gradients, pipeline.schedule.update)
    second, two = trainer.step(trainer.init(), microbatches)
    jax.tree.map(np.testing.assert_array_equal, (first.params, one.loss), (second.params, two.loss))


def test_a_run_that_resumes_reads_what_was_measured(
    trainer: Trainer, microbatches: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    counted: list[int] = []

    def count(trainer: Trainer, _: object) -> dict[StageKey, Cost]:
        counted.append(0)
        return {key: Cost(100 * len(counted), 7) for key in trainer.pipeline.stages}

    monkeypatch.setattr(stage_costs, "measured", count)
    stage_costs.settle(trainer, tmp_path, 0, microbatches[0])
    said, order, forecast = capsys.readouterr().out, trainer.pipeline.schedule.order, trainer.pipeline.schedule.forecast
    assert (
        "measured: vision/0 0.1/0.007, vision/1 0.1/0.007, llm/0 0.1/0.007" in said
        and "schedule 1f1b, 3 microbatches" in said
    )
    trainer.pipeline.reschedule(dict.fromkeys(trainer.pipeline.stages, Cost(1, 5)))
    assert trainer.pipeline.schedule.order != order
    stage_costs.settle(trainer, tmp_path, 0, microbatches[0])
    assert len(counted) == 1 and f"as {tmp_path}/costs.json has them" in capsys.readouterr().out
    assert trainer.pipeline.schedule.order == order and trainer.pipeline.schedule.forecast == forecast
    stage_costs.settle(trainer, tmp_path, 1, microbatches[0])  # another phase trains other parts
    assert len(counted) == 2
    told = json.loads((tmp_path / "costs.json").read_text())
    assert list(told) == ["phase 1", "phase 2"]
    told["phase 1"]["basis"]["llm/0"] += "other"
    (tmp_path / "costs.json").write_text(json.dumps(told))
    stage_costs.settle(trainer, tmp_path, 0, microbatches[0])
    assert len(counted) == 3 and "measured anew, for other stages than in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSONDecodeError"),
        (
            '{"phase 1": {"basis": {"llm/0": ""}, "costs": {"llm/0": [3, -1]}}}',
            r"costs of llm/0 are \[3, -1\], not three whole",
        ),
        ('{"phase 1": {"basis": {"llm/0": ""}, "costs": {"llm/0": [3, 1.5, 0]}}}', "not three whole numbers"),
        ('{"phase 1": {"basis": {"llm/0": ""}, "costs": {"llm/0": [3, 7]}}}', "not three whole numbers"),
        ('{"phase 1": {"basis": {"llm/0": ""}, "costs": {"llm/0": [3, 7, 7]}}}', "less than all"),
        ('{"phase 1": {"basis": {"llm/0": ""}, "costs": {}}}', "for the stages llm/0"),
        ('{"phase 1": {"basis": {}}}', "TypeError"),
    ],
)
def test_a_file_that_no_run_wrote_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ValueError, match=rf"costs\.json is not what a run writes \(.*{said}.*remove it"):
        stage_costs.check(tmp_path)


def test_costs_are_from_flops_or_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Experiment.schedule_costs='mesured'; it must be one of flops, measured"):
        runs.load(runs.write(tmp_path), runs.settings(schedule_costs="mesured"))
