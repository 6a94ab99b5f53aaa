"""Backwards in two programs: what is kept in between, and which products can be split.

Gradients have the bits of whole backwards: test_accumulators.py. Drawn runs are judged in test_drawn.py.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from test_offload import SCALARS, SHAPE, needs_of, watched_step

from hetjax.core import memory
from hetjax.core.layout import Layout
from hetjax.core.offload import moments
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.pairs import Paired, Telling
from hetjax.core.pipeline import Pipeline
from hetjax.core.tasks import OF_MICROBATCHES, HostTimes, Kind, StageKey, Task, Thing, What
from hetjax.core.trainer import Trainer
from models.layers import dot, dots
from models.paths import Path
from models.weight import Tell, Told, Weight

CONFIG = OptimizerConfig(name="sgd", momentum=0.9, learning_rate=0.1)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """Two stages of two layers, whose head is the embedding, and an encoder."""
    graph = tiny.graph(Layout(pp=2, devices="0-1"), {"vision": Layout(devices="2")}, jnp.float32, tied=True)
    return tiny.trainer(graph, SHAPE, CONFIG, schedule="zerobubble")


def test_what_is_kept_is_what_the_forecast_says(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Pipeline._walk
    most: dict[StageKey, int] = collections.Counter()

    def watched(pipeline: Pipeline, tasks: Sequence[Task], doing: Any) -> HostTimes:
        def watch(task: Task) -> Any:
            done = doing[task.kind](task)
            things: list[Thing] = list(doing[Kind.FORWARD].__self__.alive._device)
            for key in pipeline.stages:
                kept = {t.microbatch for t in things if t.stage == key and t.what in (What.RESIDUALS, What.PAIRS)}
                most[key] = max(most[key], len(kept))
            return done

        return walk(pipeline, tasks, dict.fromkeys(doing, watch))

    monkeypatch.setattr(Pipeline, "_walk", watched)
    trainer.gradients(trainer.init(), tiny.microbatches(SHAPE))
    forecast = trainer.pipeline.schedule.forecast
    assert most == forecast.held == {("vision", 0): 3, ("llm", 0): 2, ("llm", 1): 2}
    assert all(most[key] <= bound for key, bound in forecast.held_bounds.items())


def test_the_memory_table_counts_pairs(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first device holds what the moments of the schedule say, to the byte but for a few scalars."""
    pipeline, key, checked = trainer.pipeline, ("llm", 0), 0
    sizes = memory.things(pipeline, key, memory.local_bytes(pipeline.stages[key].kept))
    seen = watched_step(monkeypatch, trainer)
    order, made = pipeline.schedule.order, {Kind.FORWARD: What.RESIDUALS, Kind.BACKWARD: What.PAIRS}
    for (task, device, _), moment in zip(seen, moments(order, needs_of(pipeline), frozenset()), strict=True):
        if task.stage == key and task.kind in OF_MICROBATCHES:
            expected = sum(count * sizes[thing] for thing, count in moment.device if thing.stage == key)
            expected -= sizes[Thing(made[task.kind], key)] if task.kind in made else 0
            assert abs(device - expected) < SCALARS, task
            checked += task.kind is Kind.WEIGHTS
    assert checked == SHAPE.microbatches


# -- which products can be split ---------------------------------------------------------------------------------------

SHAPES = {"a": (3, 5), "b": (3, 4)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
VALUE = jnp.asarray(np.random.default_rng(1).normal(size=(3, 9)), jnp.float32)
TAPS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
Layer = Callable[[jax.Array, Weight, Weight], Any]


def weights(taps: dict[str, Any], tell: Tell | None) -> list[Weight]:
    """Two side by side."""
    told = {name: None if tell is None else Told((name,), tell) for name in SHAPES}
    columns = {"a": 0, "b": 5}
    return [Weight(VALUE, taps.get(name), shape, columns[name], 1, told[name]) for name, shape in SHAPES.items()]


def found(layer: Layer) -> dict[tuple[Path, ...], Paired]:
    """What can be left for later of a layer with these weights."""
    telling = Telling()
    pairs = telling.run(lambda given, x: layer(x, *weights(given[0], telling.tell)), (TAPS,), X)
    return {paired.paths: paired for paired in pairs}


@jax.custom_vjp
def own(x: jax.Array, w: Weight) -> jax.Array:
    """A product inside of a function with a VJP of its own."""
    return dot(x, w)


own.defvjp(functools.partial(jax.vjp, dot), lambda pull, g: pull(g))
A, B = ("a",), ("b",)
LAYERS: dict[str, tuple[Layer, set[tuple[Path, ...]]]] = {
    "side by side": (lambda x, a, b: dots(x, a, b), {(A, B)}),
    "one by one": (lambda x, a, b: (dot(x, a), dot(2 * x, b)), {(A,), (B,)}),
    "computed again": (lambda x, a, b: jax.checkpoint(lambda x: dots(x, a, b))(x), {(A, B)}),
    "twice": (lambda x, a, b: (dot(x, a) + dot(2 * x, a), dot(x, b)), {(B,)}),
    "beside another": (lambda x, a, b: (dots(x, a, b), dot(2 * x, b)), set()),
    "in a loop": (lambda x, a, b: (lax.map(lambda row: dot(row, a), x), dot(x, b)), {(B,)}),
    "in another's VJP": (lambda x, a, b: (own(x, a), dot(x, b)), {(B,)}),
    "in a batch": (lambda x, a, b: (jax.vmap(lambda row: dot(row, a))(x), dot(x, b)), {(B,)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_only_what_one_product_takes_once_is_left_for_later(name: str) -> None:
    layer, expected = LAYERS[name]
    assert set(found(layer)) == expected


@pytest.mark.parametrize("name", [name for name, (_, expected) in LAYERS.items() if expected])
def test_pairs_give_the_gradients_that_taps_do(name: str) -> None:
    layer, _ = LAYERS[name]
    pairs = found(layer)
    later = {path[0] for paths in pairs for path in paths}
    both = {key: tap for key, tap in TAPS.items() if key not in later}
    both |= {paired.path[0]: paired.zeros() for paired in pairs.values()}
    whole, split = (jax.vjp(lambda taps: layer(X, *weights(taps, None)), taps) for taps in (TAPS, both))
    g = jax.tree.map(lambda y: jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), whole[0])
    (expected,), (given,) = whole[1](g), split[1](g)
    for paired in pairs.values():
        for path, gradient in paired.gradients(given[paired.path[0]]).items():
            np.testing.assert_array_equal(gradient, expected[path[0]])
