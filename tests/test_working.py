"""Working weights: made once a step, in the precision of the products, from masters that keep theirs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hetjax.core import memory
from hetjax.core.graph import Graph
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.trainer import Trainer
from models.layers import dot, dots
from models.paths import at, flat
from models.weight import Weight

SGD = OptimizerConfig(name="sgd", learning_rate=0.5)
SHAPE = tiny.Shape(samples=4, groups=4, slots=4, microbatches=1)
DATA = tiny.microbatches(SHAPE, ())


def trainer(
    dtype: Any = jnp.bfloat16,
    masters: Any = jnp.float32,
    *,
    frozen: tuple[str, ...] = (),
    copies: bool = True,
    layout: Layout = Layout(dp=2, tp=2, devices="0-3"),
    **model: Any,
) -> Trainer:
    """The language model."""
    graph = tiny.graph(layout, {}, dtype, **model)
    graph = Graph((dataclasses.replace(graph.sink, weight_copies=copies),), ())
    return tiny.trainer(graph, SHAPE, dataclasses.replace(SGD, frozen=frozen), dtype=masters)


@pytest.fixture(scope="module")
def built() -> Trainer:
    """A trainer whose head is the embedding, compiled."""
    run = trainer(tied=True)
    run.compile()
    return run


def narrow(array: Any) -> np.ndarray:
    """Which values bfloat16 can hold."""
    values = np.asarray(array, np.float32)
    return values == np.asarray(jnp.asarray(values).astype(jnp.bfloat16), np.float32)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_no_gradient_passes_through_the_precision_of_the_products(zero: int) -> None:
    """Of one microbatch: rounded to bfloat16 anywhere on its way, every value would be one of bfloat16's."""
    run = trainer(experts=tiny.EXPERTS, layout=Layout(dp=2, tp=2, zero=zero, devices="0-3"))
    for name, compile in run.pipeline.thunks(evaluate=False):
        if "update" not in name:
            compile()
    grads = flat(run.gradients(run.init(), DATA).grads["llm", 0])
    products = {path for group in run.pipeline.stages["llm", 0].parameters.working.groups for path in group.members}
    for path in products - {("first", "embed")}:  # a token that comes once has its row's gradient, in bfloat16
        held = narrow(grads[path])[np.asarray(grads[path]) != 0]
        assert grads[path].dtype == jnp.float32 and held.mean() < 0.3, path


def test_masters_lie_in_shards_and_working_weights_are_whole_and_side_by_side() -> None:
    mine = trainer().pipeline.stages["llm", 0].parameters
    q, k, v = (mine.params["layers"]["attention"][name] for name in "qkv")
    assert all("dp" in str(leaf.sharding.spec) and leaf.dtype == jnp.float32 for leaf in (q, k, v))
    (together,) = (leaf for path, leaf in flat(mine.weights).items() if path[1:] in {("attention", n) for n in "qkv"})
    columns = sum(int(np.prod(leaf.shape[2:])) for leaf in (q, k, v))
    assert together.shape == (4, tiny.WIDTH, columns) and together.dtype == jnp.bfloat16
    assert together.sharding.shard_shape(together.shape)[2] == columns // 2 and "dp" not in str(together.sharding.spec)
    norm = mine.weights["layers"]["mlp_norm"]
    assert norm.dtype == jnp.float32 and norm == mine.params["layers"]["mlp_norm"], "no product: it has no copy"


def test_a_step_leaves_the_working_weights_of_its_parameters(built: Trainer) -> None:
    run = built
    first = run.init()
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(first.weights)]
    state, _ = run.step(first, DATA)
    moved = [np.asarray(leaf) for leaf in jax.tree.leaves(state.weights)]
    again = [np.asarray(leaf) for leaf in jax.tree.leaves(run.pipeline.weights(state.params))]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(moved, again, strict=True))
    assert sum(a.tobytes() != b.tobytes() for a, b in zip(before, moved, strict=True)) > len(before) // 2
    whole = run.whole(state.params)["llm"]["first"]["embed"]
    np.testing.assert_array_equal(state.weights["llm", 0]["first"]["embed"], whole.astype(jnp.bfloat16))


def test_an_update_gathers_in_the_precision_of_the_products(x64: None) -> None:
    """Of float64 masters and float32 products: a CPU gathers bfloat16 as float32."""
    stage = trainer(jnp.float32, jnp.float64).pipeline.stages["llm", 0]
    stage.thunks(evaluate=False)["update"]()
    gathers = [line for line in stage.programs["update"].as_text().splitlines() if " all-gather(" in line]
    wide = [line for line in gathers if "f64[" in line.split(" all-gather(")[0]]
    mine = stage.parameters
    uncopied = [path for path, leaf in flat(mine.params).items() if at(mine.weights, path) == leaf]
    assert len(gathers) - len(wide) >= len(flat(mine.copies)) and len(wide) <= len(uncopied)


def test_a_module_may_decline_and_trains_the_same(x64: None) -> None:
    runs = [trainer(jnp.float64, jnp.float64, copies=copies) for copies in (False, True)]
    assert [bool(run.pipeline.stages["llm", 0].parameters.copies) for run in runs] == [False, True]
    for run in runs:
        run.compile()
    states = [run.step(run.init(), DATA)[0] for run in runs]
    for mine, theirs in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    sizes = []
    for copies in (False, True):
        mine = trainer(copies=copies, layout=Layout()).pipeline.stages["llm", 0].parameters
        sizes.append(memory.local_bytes((mine.params, mine.copies)))
    assert sizes[0] < sizes[1] < 2 * sizes[0], "on one replica no master is cut"


def test_a_frozen_weight_is_not_joined(x64: None) -> None:
    run = trainer(jnp.float64, frozen=("llm/layers/attention/k",))
    working = run.pipeline.stages["llm", 0].parameters.working
    names = [{path[-1] for path in group.members} for group in working.groups]
    assert {"q", "v"} in names and {"k"} in names and {"gate", "up"} in names


def test_the_memory_table_counts_both(built: Trainer) -> None:
    state = built.init()
    on = built.spec.devices[2]
    arrays = {id(a): a for a in jax.tree.leaves((state.params, state.weights))}.values()
    held = sum(s.data.nbytes for a in arrays for s in a.addressable_shards if s.device == on)
    assert memory.estimate(built)[2].weights == held


def test_a_table_without_a_tap_and_a_head_that_is_none_are_refused() -> None:
    definition = tiny.decoder().module(jnp.float32)
    for wrong in ({"table": "norm"}, {"head": "embed"}):
        with pytest.raises(ValueError, match=f"ModuleDef.{next(iter(wrong))}="):
            dataclasses.replace(definition, **wrong)


def test_products_of_weights_side_by_side_are_those_of_each(x64: None) -> None:
    """In whatever order they are asked for, and one by one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5))
    arrays = {name: rng.normal(size=shape) for name, shape in {"a": (5, 2, 3), "b": (5, 4), "c": (5, 1, 2)}.items()}
    value = np.concatenate([a.reshape(5, -1) for a in arrays.values()], -1)
    columns = dict(zip(arrays, (0, 6, 10), strict=True))

    def given(taps: dict[str, Any]) -> dict[str, Weight]:
        return {n: Weight(jnp.asarray(value), taps[n], a.shape, columns[n]) for n, a in arrays.items()}

    for order in ("abc", "cab", "b", "ca"):
        zeros = {name: jnp.zeros(arrays[name].shape) for name in arrays}
        taken = [arrays[name] for name in order]
        got, pull = jax.vjp(lambda x, taps, order=order: dots(x, *(given(taps)[n] for n in order)), x, zeros)
        expected, pull_each = jax.vjp(lambda x, ws: [dot(x, w) for w in ws], x, taken)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-13, atol=1e-13)
        g_x, g_taps = pull(list(expected))
        own_x, own = pull_each(list(expected))
        np.testing.assert_allclose(g_x, own_x, rtol=1e-13, atol=1e-13)
        for name, theirs in zip(order, own, strict=True):
            np.testing.assert_allclose(g_taps[name], theirs, rtol=1e-13, atol=1e-13)
