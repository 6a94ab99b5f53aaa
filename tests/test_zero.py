"""ZeRO-1, 2 and 3, over all data replicas or a part of them: what lies in shards, and what travels when."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from traced import Collective, collectives

from hetjax.core import budget, memory
from hetjax.core.graph import Graph, Module
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.parameters import Parameters
from hetjax.core.plan import plan_stages
from hetjax.core.remat import Keep, Remat
from hetjax.core.stage import Stage
from hetjax.core.tasks import OF_STAGES, Thing
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from hetjax.run.named import abstract_names, from_names, to_names
from models.decoder import Decoder
from models.paths import flat

SHAPE = tiny.Shape(samples=8, groups=8, slots=8, microbatches=1)
ADAMW = OptimizerConfig(learning_rate=0.1)
MODEL = tiny.decoder(num_layers=3)


def trainer(
    layout: Layout, *, model: Decoder = MODEL, dtype: Any = jnp.bfloat16, copies: bool = True, **options: Any
) -> Trainer:
    """The language model alone; nothing is compiled."""
    example = tiny.microbatches(SHAPE, ())[0]
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in example.items()}
    graph = Graph((Module("llm", model.module(dtype), layout, weight_copies=copies),), ())
    sizes = dict(groups=SHAPE.groups, num_microbatches=SHAPE.microbatches)
    return Trainer(TrainSpec(graph=graph, devices=jax.devices(), batch=batch, optimizer=ADAMW, **sizes, **options))


def stage(layout: Layout, **options: Any) -> Stage:
    return trainer(layout, **options).pipeline.stages["llm", 0]


def over_data(stage: Stage, program: str) -> list[Collective]:
    """A program's collectives over data axes, but for the sum of the loss."""
    found = collectives(stage, program)
    return [c for c in found if set(c.axes) & set(stage.plan.grid.data) and c.size > 1]


@pytest.mark.parametrize("size", [None, 2])
def test_zero_1_moves_nothing_over_data_replicas_in_a_microbatch(size: int | None) -> None:
    mine = stage(Layout(dp=4, tp=2, zero_size=size))
    assert not over_data(mine, "forward") and not over_data(mine, "backward")
    across = {"dp0"} if size else set()
    sums = {axis for c in collectives(mine, "reduce") if c.kind == "psum" and c.size > 64 for axis in c.axes}
    assert sums - {"copies", "cp", "tp"} == across


@pytest.mark.parametrize(("zero", "size", "copies"), [(2, None, True), (3, None, False), (3, 2, True)])
def test_zero_2_and_3_scatter_once_a_layer_and_zero_3_gathers_in_the_narrow_type(
    zero: int, size: int | None, copies: bool
) -> None:
    mine = stage(Layout(dp=4, tp=2, zero=zero, zero_size=size), copies=copies)
    inside = [axis for axis in mine.plan.grid.spread((8, 8), P()).inside if mine.plan.mesh.shape[axis] > 1]
    backward = over_data(mine, "backward")
    assert all(set(c.axes) == set(inside) for c in backward), "nothing crosses to the others that have the same shards"
    scatters = [c for c in backward if c.kind == "reduce_scatter"]
    assert all(c.dtype == "float32" for c in scatters)
    assert sorted(c.times for c in scatters) == [1, 1, 3], "head, embedding, and one for all of a layer"
    layers = flat(mine.parameters.leaves["layers"])
    per_layer = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)[1:])
        for path, leaf in layers.items()
        if mine.parameters.working.spreads["layers", *path].early
    )
    assert max(c.size for c in scatters if c.times == 3) == per_layer > 1000
    gathers = {name: [c for c in over_data(mine, name) if c.kind == "all_gather"] for name in ("forward", "backward")}
    together = 4 if copies else 7  # q, k and v; o; gate and up; down
    for found in gathers.values():  # the embedding's or the head's, the first layer's, and beside each layer the next
        assert sorted(c.times for c in found) == ([1] + [1] * together + [3] * together if zero == 3 else [])
        assert all(c.dtype == "bfloat16" for c in found)
    assert len(backward) == len(scatters) + len(gathers["backward"])


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.FULL])
def test_gathered_weights_are_not_kept_for_the_backward(remat: Remat) -> None:
    kept = [budget.kept_bytes(stage(Layout(dp=4, zero=zero)), Keep(remat).policy) for zero in (1, 3)]
    assert kept[0] == kept[1] > 0


def test_no_stack_of_layers_is_whole_at_any_time() -> None:
    """With more layers the backward's workspace, of weights and of gradients, does not grow."""

    def workspace(num_layers: int) -> int:
        mine = stage(Layout(dp=4, zero=3), model=tiny.decoder(num_layers=num_layers), dtype=jnp.float32)
        mine.thunks(evaluate=False)["backward"]()
        return mine.memory["backward"].temp_size_in_bytes

    layer = stage(Layout(dp=4, zero=2)).parameters.working.scattered_bytes("layers")
    assert workspace(8) - workspace(3) < layer


RESTORED = (Layout(dp=4, zero=3, zero_size=2), Layout(dp=2, pp=2, tp=2, zero=2))


def test_what_was_saved_under_one_level_restores_under_another() -> None:
    """Bit by bit, there and on; devices hold what the memory table says."""
    runs = [trainer(layout, model=tiny.decoder(tied=True, num_layers=2)) for layout in RESTORED]
    rng = np.random.default_rng(0)
    first = {name: rng.normal(size=a.shape).astype(a.dtype) for name, a in abstract_names(runs[0]).items()}
    names = first
    for run in runs:
        state = from_names(run, names, 3)
        for key, mine in run.pipeline.stages.items():
            held = {id(a): a for a in jax.tree.leaves((state.params[key], state.weights[key], state.optimizer[key]))}
            device = mine.plan.mesh.devices.flat[0]
            bytes_held = sum(s.data.nbytes for a in held.values() for s in a.addressable_shards if s.device == device)
            told = memory.things(run.pipeline, key, 0)
            assert bytes_held == sum(told[Thing(what, key)] for what in OF_STAGES)
        names = {name: np.asarray(a) for name, a in to_names(run, state).items()}
    assert names.keys() == first.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(names[name], array, err_msg=name)


WHOLE, HALF, ALL = 1, 2, 8
DIVIDED = {  # (compute dtype, zero, zero_size) -> by what: state, accumulators, copies, parameters
    ("bfloat16", 1, None): (ALL, WHOLE, WHOLE, ALL),
    ("bfloat16", 2, None): (ALL, ALL, WHOLE, ALL),
    ("bfloat16", 3, None): (ALL, ALL, ALL, ALL),
    ("bfloat16", 3, 2): (HALF, HALF, HALF, HALF),
    ("bfloat16", 1, 1): (WHOLE, WHOLE, WHOLE, WHOLE),
    ("float32", 3, None): (ALL, ALL, ALL, ALL),  # weights that lie alone are the parameters themselves
}


@pytest.mark.parametrize(("dtype", "zero", "size"), DIVIDED)
def test_levels_divide_what_their_names_say(dtype: str, zero: int, size: int | None) -> None:
    """Bytes on each of 8 devices, against one's; a few norms and biases apart."""

    def held(**layout: Any) -> np.ndarray:
        module = Module("llm", MODEL.module(jnp.dtype(dtype)), Layout(**layout))
        (plan,) = plan_stages(module.name, module.definition, module.layout, jax.devices())
        mine = Parameters(module, plan, ADAMW, seed=0, dtype=jnp.float32)
        return np.array([memory.local_bytes(tree) for tree in (mine.state, mine.acc, mine.copies, mine.params)])

    ratios = held() / held(dp=8, zero=zero, zero_size=size)
    np.testing.assert_allclose(ratios, DIVIDED[dtype, zero, size], rtol=0.25)
