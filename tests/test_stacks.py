"""Layers of several kinds: each leaf is stacked over those that have it, and runs of kinds take their rows from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetjax.core import stacks
from hetjax.core.stacks import Run
from models.contract import ModuleDef, Part


def kind(**logical: object) -> Part:
    names = logical.keys()
    init = lambda key: {name: jax.random.normal(jax.random.fold_in(key, len(name)), (2,)) for name in names}
    return Part(init, lambda params, x, batch, axes: x, dict(logical))


DENSE, SPARSE = kind(norm=(None,), mlp={"up": (None,)}), kind(norm=(None,), moe={"up": (None,), "router": (None,)})
LAYERS = (DENSE, DENSE, SPARSE, DENSE, SPARSE, SPARSE)
MODULE = ModuleDef(first=DENSE, layers=LAYERS, last=DENSE, reads={}, carry={}, output={}, config=None)
A, B = kind(norm=(None,), a=(None,)), kind(norm=(None,), bb=(None,))


def stacked(layers: tuple[Part, ...]) -> dict:
    """Stacks in which a leaf's row is ten times its layer's number."""
    rows = lambda path: np.array([[10.0 * i] for i, p in enumerate(layers) if stacks._has(p.logical, path)])
    paths = [("norm",), ("mlp", "up"), ("moe", "up"), ("moe", "router")]
    return stacks.join([{p[0]: rows(p)} if len(p) == 1 else {p[0]: {p[1]: rows(p)}} for p in paths if len(rows(p))])


def test_runs_repeat_a_period_of_parts() -> None:
    assert stacks.runs(LAYERS) == [Run(0, 2, (DENSE,)), Run(2, 1, (SPARSE,)), Run(3, 1, (DENSE,)), Run(4, 2, (SPARSE,))]
    assert stacks.runs((DENSE,) * 4) == [Run(0, 4, (DENSE,))] and stacks.runs(()) == []
    assert stacks.runs((DENSE, SPARSE) * 3) == [Run(0, 3, (DENSE, SPARSE))]
    assert [run.lo for run in stacks.runs((DENSE, SPARSE, DENSE))] == [0, 1, 2]
    assert stacks.runs((DENSE, DENSE, SPARSE) * 2 + (DENSE,)) == [
        Run(0, 2, (DENSE, DENSE, SPARSE)),
        Run(6, 1, (DENSE,)),
    ]


def test_a_period_is_short_whatever_repeats() -> None:
    layers = ((A,) * 4 + (B,) * 4) * 2
    assert [(run.lo, run.times, len(run.period)) for run in stacks.runs(layers)] == [(i, 4, 1) for i in (0, 4, 8, 12)]


def test_a_leaf_holds_the_layers_that_have_it() -> None:
    assert stacks.holders(MODULE, ["norm"], 1, 5) == [1, 2, 3, 4]
    assert stacks.holders(MODULE, ["mlp", "up"], 1, 5) == [1, 3]
    assert stacks.holders(MODULE, ["moe", "router"], 3, 6) == [4, 5]
    assert stacks.holders(MODULE, ["moe", "gate"], 0, 6) == []


@pytest.mark.parametrize(
    "layers",
    [LAYERS, (DENSE, SPARSE) * 3, (DENSE, DENSE, SPARSE) * 2 + (DENSE,)],
    ids=["runs", "alternating", "period of three"],
)
def test_every_layer_takes_its_own_rows(layers: tuple[Part, ...]) -> None:
    whole = stacked(layers)
    met = []
    for run in stacks.runs(layers):
        for i in range(run.times):
            for place, part in enumerate(run.period):
                found = stacks.take(whole, stacks.rows(whole, layers, run, place), jnp.int32(i))
                number = run.lo + i * len(run.period) + place
                met.append(number)
                assert part is layers[number]
                assert jax.tree.structure(found) == jax.tree.structure(part.logical, is_leaf=lambda x: x == (None,))
                assert all(leaf.tolist() == [10.0 * number] for leaf in jax.tree.leaves(found))
    assert met == list(range(len(layers)))


def test_of_some_of_the_leaves_a_layer_takes_those_that_it_has() -> None:
    some = {"moe": {"router": stacked(LAYERS)["moe"]["router"]}}
    runs = stacks.runs(LAYERS)
    assert stacks.rows(some, LAYERS, runs[0], 0) == {}
    rows = stacks.rows(some, LAYERS, runs[3], 0)
    assert stacks.take(some, rows, jnp.int32(1))["moe"]["router"].tolist() == [50.0]


def test_initial_values_are_those_of_each_layer_alone() -> None:
    layers = (A, B, B, A)
    keys = jax.random.split(jax.random.key(0), len(layers))
    found = stacks.init(layers, keys)
    for name, holders in {"norm": (0, 1, 2, 3), "a": (0, 3), "bb": (1, 2)}.items():
        np.testing.assert_array_equal(found[name], [layers[i].init(keys[i])[name] for i in holders])
