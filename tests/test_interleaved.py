"""Several stages of a module on the same devices: they train to the same bits as on devices of their own, and keep what
the forecast says."""

import collections
import gc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.pipeline import IN_FLIGHT, Pipeline
from hetjax.core.plan import picture, plan_stages
from hetjax.core.tasks import HostTimes, Kind, StageKey, Task, Thing, What
from hetjax.core.trainer import Trainer

SHAPE = tiny.Shape(samples=2, groups=2, slots=4, microbatches=12)
FROZEN = OptimizerConfig(name="sgd", momentum=0.9, learning_rate=0.1, frozen=("vision/*",))
INTERLEAVED, APART = Layout(pp=2, vpp=2, devices="0-1"), Layout(pp=4, devices="0-3")


def built(llm: Layout) -> Trainer:
    """The embedding is tied to the head, and the frozen encoder on a device of its own."""
    graph = tiny.graph(llm, {"vision": Layout(devices="4")}, jnp.float32, tied=True)
    return tiny.trainer(graph, SHAPE, FROZEN)


@pytest.fixture(scope="module")
def frozen() -> Trainer:
    return built(INTERLEAVED)


def test_stages_are_dealt_round() -> None:
    definition = tiny.graph(Layout(), {"vision": Layout()}, jnp.float32).sink.definition
    plans = plan_stages("llm", definition, Layout(pp=2, vpp=2, tp=2, layers=(1, 1, 1, 1)), jax.devices())
    assert [plan.device_ids for plan in plans] == [(0, 1), (2, 3)] * 2
    assert [(plan.lo, plan.hi, plan.first, plan.last) for plan in plans] == [
        (n, n + 1, n == 0, n == 3) for n in range(4)
    ]
    assert picture(plans, 4).splitlines()[1:] == [
        "0       layers 0,2 tp0",
        "1       layers 0,2 tp1",
        "2       layers 1,3 tp0",
        "3       layers 1,3 tp1",
    ]


def test_a_step_has_the_bits_of_stages_on_their_own_devices(frozen: Trainer) -> None:
    found = []
    for trainer in (built(APART), frozen):
        state, outcome = trainer.step(trainer.init(), tiny.microbatches(SHAPE))
        values = jax.tree.leaves((state.params, state.optimizer, outcome.loss, outcome.norm))
        found.append([np.asarray(leaf).tobytes() for leaf in values])
    assert found[0] == found[1]


class Watch:
    """What is alive behind each forward and backward of a step."""

    def __init__(self) -> None:
        self.held: dict[StageKey, int] = collections.Counter()  # most microbatches that residuals are kept of
        self.before = jax.live_arrays()
        self.arrays: dict[int, int] = {}  # made since, but for numbers and for pictures that wait; by microbatch

    def walk(self, walk: Callable[..., HostTimes], pipeline: Pipeline, tasks: Sequence[Task], doing: Any) -> HostTimes:
        def watched(task: Task) -> Any:
            done = doing[task.kind](task)
            if task.kind in (Kind.FORWARD, Kind.BACKWARD):
                things: list[Thing] = list(doing[task.kind].__self__.alive._device)
                for key in pipeline.stages:
                    count = sum(thing.what is What.RESIDUALS and thing.stage == key for thing in things)
                    self.held[key] = max(self.held[key], count)
            if task.kind is Kind.BACKWARD and task.stage == ("llm", 0):
                gc.collect()
                known = set(map(id, self.before))
                made = sum(a.ndim > 0 and id(a) not in known for a in jax.live_arrays())
                self.arrays[task.microbatch] = made - sum(thing.source == ("vision", 0) for thing in things)
            return done

        return walk(pipeline, tasks, dict.fromkeys(doing, watched))


@pytest.mark.slow
def test_what_is_held_is_what_the_forecast_says_and_does_not_grow(
    frozen: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a frozen encoder nothing is kept but what waits for the language model. Between the groups of two microbatches
    as much comes as goes."""
    watch, walk = Watch(), Pipeline._walk
    monkeypatch.setattr(Pipeline, "_walk", lambda self, tasks, doing: watch.walk(walk, self, tasks, doing))
    frozen.gradients(frozen.init(), tiny.microbatches(SHAPE))
    forecast = frozen.pipeline.schedule.forecast
    assert watch.held == forecast.in_flight
    assert forecast.in_flight == {("vision", 0): 0, **{("llm", n): most for n, most in enumerate((4, 3, 2, 1))}}
    assert all(most <= forecast.bounds[key] for key, most in watch.held.items())
    assert frozen.pipeline.in_flight["llm", 0] * 2 == frozen.pipeline.in_flight["vision", 0] == IN_FLIGHT
    assert watch.arrays[3] == watch.arrays[5] == watch.arrays[7]
