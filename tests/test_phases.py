"""Phases: parameters carry over exactly, the optimizer starts anew, and a run that stops goes on in the right one."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from runs import Reference

from hetjax import train, verify
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.trainer import State, Trainer
from hetjax.judge import compare
from hetjax.judge.reference import Reference as Judge
from hetjax.run import config, experiment
from hetjax.run.checkpoint import CheckpointError, Checkpoints
from hetjax.run.experiment import Experiment, Phase
from hetjax.run.log import Log
from hetjax.run.metrics import FILE
from hetjax.run.named import to_names

SHAPE = tiny.Shape(samples=4, groups=4, slots=8, microbatches=2)
LAYOUTS = (Layout(tp=2, pp=2, devices="0-3"), {"vision": Layout(dp=2, devices="4-5")})
PROJECTOR = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=4, frozen=("*",), trainable=("vision/last/projector/*",), clip_norm=0.1
)
ALL = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1)


def values(trainer: Trainer, state: State) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in to_names(trainer, state).items()}


@pytest.mark.usefixtures("x64")
def test_the_second_phase_begins_where_the_first_ended_as_on_one_device() -> None:
    graph = tiny.graph(*LAYOUTS, jnp.float64, tied=True)
    one = tiny.trainer(graph, SHAPE, PROJECTOR, dtype=jnp.float64)
    two = tiny.trainer(graph, SHAPE, ALL, dtype=jnp.float64, first_step=3)
    for index in range(2):
        stage = one.pipeline.stages["llm", index]
        assert stage.has_backward and not stage.parameters.trains, "no gradient is computed for what is frozen"
        assert stage.parameters.state == () and stage.parameters.acc == {}
    state = one.init()
    fresh = values(one, state)
    for seed in range(3):
        state, _ = one.step(state, tiny.microbatches(SHAPE, seed=seed))
    left = values(one, state)
    trained = {name for name, array in fresh.items() if not np.array_equal(array, left[name])}
    projector = {name for name in left if "/vision/" in name and ("projector" in name or name.endswith("count"))}
    assert trained == projector and any(name.startswith("optimizer") for name in trained)
    state = two.begin(state)
    begun = values(two, state)
    for name, array in begun.items():
        np.testing.assert_array_equal(array, left[name] if name.startswith("params/") else 0, err_msg=name)
    assert state.step == 3 and [two.learning_rate(step) for step in (4, 5, 6)] == [5e-4, 1e-3, 1e-3]

    reports = compare.compare(two, [tiny.microbatches(SHAPE, seed=9)], Judge(graph, ALL), start=state)
    (report,) = reports
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), report
    assert set(report.gradients) == {"vision", "llm"}


# -- whole runs ------------------------------------------------------------------------------------------------------


def write(directory: Path) -> Path:
    """The tests' run.gin in two phases: three steps of the projector, then four of everything."""
    gin = runs.write(directory)
    lines = [line for line in gin.read_text().splitlines() if ".Experiment.steps" not in line]
    lines.remove("experiment.Experiment.optimizer = @optimizer.OptimizerConfig()")
    gin.write_text(
        "\n".join(lines)
        + """
experiment.Experiment.save_every = 2
experiment.Experiment.phases = [@one/experiment.Phase(), @two/experiment.Phase()]
one/experiment.Phase.steps = 3
one/experiment.Phase.optimizer = @one/optimizer.OptimizerConfig()
one/optimizer.OptimizerConfig.frozen = ("*",)
one/optimizer.OptimizerConfig.trainable = ("vision/last/projector/*",)
two/experiment.Phase.steps = 4
two/experiment.Phase.optimizer = @two/optimizer.OptimizerConfig()
two/optimizer.OptimizerConfig.learning_rate = 1e-3
"""
    )
    return gin


def curves(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    records = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    kept = ("step", "loss", "learning_rate", "gradient_norm")
    return [{k: v for k, v in record.items() if k.startswith(kept) and k != "step_seconds"} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed; run.gin is beside it."""
    gin = write(tmp_path_factory.mktemp("phases"))
    train.train(runs.load(gin, {}), gin.parent / "whole")
    return gin.parent / "whole"


def test_steps_count_on_and_each_phase_has_its_own_rate(whole: Path) -> None:
    found = curves(whole)
    assert [record["step"] for record in found] == list(range(1, 8))
    expected = [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3]  # a warm-up of three steps in each
    np.testing.assert_allclose([record["learning_rate"] for record in found], expected)
    assert ["gradient_norm/llm" in record for record in found] == [False] * 3 + [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(3,), (2, 5)], ids=["between them", "within both phases"])
def test_a_run_that_is_stopped_goes_on_in_its_phase_bit_for_bit(
    whole: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, workdir = runs.load(whole.parent / "run.gin", {}), whole.parent / f"stopped{len(stops)}"
    plain = Log.step

    def step(self: Log, step: int, *rest: Any) -> None:
        plain(self, step, *rest)
        if step in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "step", step)
    for stop in stops:
        train.train(run, workdir)
        assert curves(workdir)[-1]["step"] == stop
    train.train(run, workdir)
    assert curves(workdir) == curves(whole)
    one, other = restored(run, workdir), restored(run, whole)
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_that_dies_in_its_second_phase_ends_as_if_it_had_not(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, workdir = runs.load(whole.parent / "run.gin", {}), whole.parent / "died"
    plain = Trainer.step

    def step(self: Trainer, state: State, *rest: Any) -> Any:
        if state.step == 5:
            raise KeyboardInterrupt  # between two saves; the last step is saved as it ends
        return plain(self, state, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "step", step)
        train.train(run, workdir)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest == 5
    train.train(run, workdir)
    assert curves(workdir) == curves(whole)


def test_a_phase_that_would_begin_elsewhere_is_refused(whole: Path) -> None:
    other = {"one/experiment.Phase.steps": 2, "two/experiment.Phase.steps": 5}  # as many in all
    message = "7: its phase began behind step 3, but this run's phase of step 7 begins behind step 2; set Experiment.ph"
    with pytest.raises(CheckpointError, match=message):
        train.train(runs.load(whole.parent / "run.gin", other), whole)


def restored(run: Experiment, workdir: Path) -> dict[str, np.ndarray]:
    trainer = experiment.build(run, 1)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return values(trainer, checkpoints.restore(trainer)[0])


@pytest.mark.slow
def test_either_phase_goes_on_under_other_layouts(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gin, workdir = whole.parent / "run.gin", whole.parent / "moved"
    plain = Checkpoints.save
    stop: list[int] = [2]

    def save(self: Checkpoints, trainer: Trainer, state: State, data: Mapping[str, Any]) -> None:
        plain(self, trainer, state, data)
        if state.step in stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save)
    train.train(runs.load(gin, {}), workdir)
    stop[:] = [4]
    train.train(runs.load(gin, runs.layouts(vision=dict(dp=4), llm=dict(pp=2, dp=2))), workdir)
    stop[:] = []
    train.train(runs.load(gin, runs.layouts(vision=dict(pp=2), llm=dict(tp=2, devices="4-5"))), workdir)
    moved, expected = ([record["loss"] for record in curves(path)] for path in (workdir, whole))
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


@pytest.mark.slow
def test_verify_compares_every_phase(whole: Path, capsys: pytest.CaptureFixture) -> None:
    status = verify.main([f"--gin_file={whole.parent / 'run.gin'}", "--steps=1", "--dtype=float32"])
    said = capsys.readouterr().out
    assert status == 0 and said.count(": within tolerance") == 2 and "phase 2 of 2" in said
    assert said.partition("phase 2 of 2")[0].count("llm ") < said.partition("phase 2 of 2")[2].count("llm ")


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_operative_config_of_phases_makes_the_same_run(whole: Path) -> None:
    run = runs.load(whole.parent / "run.gin", {})
    text = whole.parent / "operative.gin"
    text.write_text(config.operative(run))
    assert config.load([str(text)], [], Experiment) == run


def test_impossible_phases_are_refused_by_name(whole: Path) -> None:
    gin = whole.parent / "run.gin"
    with pytest.raises(
        ValueError, match=r"Experiment\.steps is set beside phases, which have their own; set Phase\.steps"
    ):
        runs.load(gin, runs.settings(steps=5))
    with pytest.raises(ValueError, match=r"Experiment\.optimizer is set beside phases"):
        runs.load(gin, runs.settings(optimizer=Reference("@two/optimizer.OptimizerConfig()")))
    with pytest.raises(ValueError, match=r"Phase\.steps=0; it must be at least 1"):
        Phase(steps=0)
    with pytest.raises(ValueError, match="freezes every parameter"):
        train.train(runs.load(gin, {"two/optimizer.OptimizerConfig.frozen": ("*",)}), whole.parent / "none")
    assert not (whole.parent / "none").exists()
