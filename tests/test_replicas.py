"""Replicas of an encoder: the same bits under every schedule, one encoder in what is saved and measured, no more in
memory than is promised. That they train as the reference does, test_parity.py and test_drawn.py say."""

import dataclasses
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_interleaved import Watch

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.packing import Prepared
from hetjax.core.pipeline import Pipeline
from hetjax.core.plan import picture, plan_stages
from hetjax.core.trainer import State, Trainer
from hetjax.run.checkpoint import Checkpoints
from hetjax.run.named import to_names

SHAPE = tiny.Shape(samples=2, groups=2, slots=4, microbatches=5)
MOMENTUM = OptimizerConfig(name="sgd", momentum=0.9, learning_rate=0.1, frozen=("vision/first/*",))
LLM, REPLICAS, ONE = Layout(pp=2, devices="0-1"), Layout(replicas=2, devices="0-1"), Layout(devices="0")
SCHEDULES: list[dict[str, Any]] = [dict(encoder_window=2), dict(schedule="gpipe")]


def graph(vision: Layout = REPLICAS, llm: Layout = LLM) -> Any:
    return tiny.graph(llm, {"vision": vision}, jnp.bfloat16, tied=True)


@functools.cache
def trainer() -> Trainer:
    return tiny.trainer(graph(), SHAPE, MOMENTUM)


def scheduled(**options: Any) -> Trainer:
    """One with another schedule, and the programs of the first."""
    with mock.patch.object(Trainer, "compile"):
        other = tiny.trainer(graph(), SHAPE, MOMENTUM, **options)
    for key, stage in other.pipeline.stages.items():
        same = trainer().pipeline.stages[key]
        stage.programs, stage.memory, stage.kept = same.programs, same.memory, same.kept
    other.finish.decide, other.finish.add = trainer().finish.decide, trainer().finish.add
    return other


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def steps(of: Trainer, state: State, seeds: range) -> tuple[State, list[float]]:
    told = []
    for seed in seeds:
        state, outcome = of.step(state, tiny.microbatches(SHAPE, seed=seed))
        told += [float(outcome.loss), float(outcome.norm)]
    return state, told


def test_each_replica_has_its_own_devices_and_all_layers() -> None:
    definition = graph().encoders[0].definition
    plans = plan_stages("vision", definition, Layout(replicas=2, dp=2, devices="2,3,6,7"), jax.devices())
    assert [(plan.key, plan.device_ids) for plan in plans] == [(("vision", 0), (2, 3)), (("vision", 1), (6, 7))]
    assert all(plan.first and plan.last and (plan.lo, plan.hi) == (0, 2) for plan in plans)
    assert picture(plans, 8).splitlines()[3:5] == ["2       layers 0-1 replica0 dp0", "3       layers 0-1 replica0 dp1"]
    assert picture(plans, 8).splitlines()[7:] == ["6       layers 0-1 replica1 dp0", "7       layers 0-1 replica1 dp1"]


def test_every_schedule_gives_the_same_bits() -> None:
    every = [trainer(), *(scheduled(**options) for options in SCHEDULES)]
    assert len({one.pipeline.schedule.order for one in every}) == len(every)
    found = []
    for one in every:
        state, told = steps(one, one.init(), range(2))
        found.append([bits((state.params, state.optimizer, state.weights)), told])
    assert all(one == found[0] for one in found)


def test_replicas_have_the_weights_of_the_first_and_nothing_else() -> None:
    """At the start and behind each step; the frozen part too."""
    for seeds in (range(0), range(1)):
        state, _ = steps(trainer(), trainer().init(), seeds)
        first, second = ("vision", 0), ("vision", 1)
        assert bits(state.weights[first]) == bits(state.weights[second])
        assert not jax.tree.leaves((state.params[second], state.optimizer[second]))
        assert {device.id for leaf in jax.tree.leaves(state.weights[second]) for device in leaf.devices()} == {1}


def test_every_gradient_is_measured_once() -> None:
    finish = trainer().finish
    paths = [path for _, of_stage in finish.paths for path in of_stage]
    mine = trainer().pipeline.stages["vision", 0].parameters
    trained = [path for path in paths if path.startswith("vision/")]
    assert len(trained) == len(set(trained)) == len(jax.tree.leaves(mine.grads)) > 0


def test_what_is_saved_with_replicas_is_restored_without_and_back(tmp_path: Path) -> None:
    state, _ = steps(trainer(), trainer().init(), range(1))
    plain = tiny.trainer(graph(ONE), SHAPE, MOMENTUM)
    values = lambda of, state: {name: np.asarray(a) for name, a in to_names(of, state).items()}
    saved = values(trainer(), state)
    with Checkpoints(tmp_path / "with") as checkpoints:
        checkpoints.save(trainer(), state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(plain)
    with Checkpoints(tmp_path / "without") as checkpoints:
        checkpoints.save(plain, restored, {})
        checkpoints.wait()
        back, _ = checkpoints.restore(trainer())
    for one, of in ((restored, plain), (back, trainer())):
        again = values(of, one)
        assert again.keys() == saved.keys() and all(np.array_equal(again[name], saved[name]) for name in saved)
    expected, told = steps(trainer(), back, range(1, 2))
    np.testing.assert_allclose(steps(plain, restored, range(1, 2))[1], told, rtol=2e-2)
    assert bits(expected.weights["vision", 0]) == bits(expected.weights["vision", 1])


def test_what_is_held_is_what_the_forecast_says(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Pipeline._walk
    for one, of_vision in ((trainer(), (3, 2)), (scheduled(**SCHEDULES[0]), (1, 1))):
        watch = Watch()
        watched = functools.partialmethod(lambda self, watch, *args: watch.walk(walk, self, *args), watch)
        with monkeypatch.context() as patched:
            patched.setattr(Pipeline, "_walk", watched)
            one.gradients(one.init(), tiny.microbatches(SHAPE))
        forecast = one.pipeline.schedule.forecast
        most = {("vision", n): count for n, count in enumerate(of_vision)} | {("llm", 0): 2, ("llm", 1): 1}
        assert watch.held == forecast.in_flight == most
        assert all(count <= forecast.bounds[key] for key, count in watch.held.items())


def test_what_replicas_read_is_packed_once() -> None:
    packed = Prepared(tiny.microbatches(SHAPE)[0], trainer().pipeline.packings).packed
    first, second = (packed["vision", n] for n in (0, 1))
    assert first and all(one is two for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("vision", "llm", "message"),
    [
        (Layout(replicas=8), LLM, "vision: replicas=8 share the microbatches of a step, of which there are num_microb"),
        (REPLICAS, Layout(replicas=2), "llm: replicas=2, but it is encoders whose replicas work in the pipeline"),
    ],
)
def test_impossible_replicas_are_refused(vision: Layout, llm: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message), mock.patch.object(Trainer, "compile"):
        tiny.trainer(graph(vision, llm), SHAPE, MOMENTUM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(replicas=0), "Layout.replicas=0; it must be a whole number of at least 1"),
        (dict(replicas=2, pp=2), "Layout.replicas=2 with pp=2: a replica has all layers, .* set pp=1, or replicas=1"),
    ],
)
def test_impossible_layouts_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**settings)


def test_biases_alone_cannot_move_in_replicas() -> None:
    experts = dataclasses.replace(tiny.EXPERTS, count=8, dense_layers=(0,), selection_bias=True, bias_rate=0.05)
    seeing = tiny.graph(LLM, {"vision": REPLICAS}, jnp.float32, seeing=experts)
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, frozen=("vision/*",), trainable=("vision/layers/moe/*bias*",)
    )
    with pytest.raises(ValueError, match="a step moves biases of routers and trains nothing else"):
        tiny.trainer(seeing, SHAPE, config)
