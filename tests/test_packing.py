"""Microbatches arrive bit for bit, whatever their types and layouts, in one array per stage and no trip to the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import Counter

from hetjax.core.layout import Layout, make_grid, zigzag
from hetjax.core.mesh import Grid
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.packing import Packing, Prepared, packings, unpack
from hetjax.core.remat import Remat

DIMS = {"text": ("batch", "seq"), "items": ("items", None, None), "whole": (None, None), "rows": ("batch",)}
TYPES = {
    "text": (np.int32, np.float32, np.bool_, np.uint8),
    "items": (np.float32, np.int16, jnp.bfloat16, np.bool_),
    "whole": (np.int32,),
    "rows": (np.uint8, np.float16),
}
SHAPES = {"text": (4, 24), "items": (8, 3, 5), "whole": (3, 7), "rows": (4,)}


def microbatch(*, wide: bool) -> dict[str, np.ndarray]:
    """Random bytes, so that NaNs of all kinds are among the numbers."""
    rng, arrays = np.random.default_rng(0), {}
    for kind, types in TYPES.items():
        for dtype in map(np.dtype, (*types, np.float64, np.int64) if wide else types):
            shape = SHAPES[kind]
            if dtype == np.bool_:
                arrays[f"{kind}.{dtype}"] = rng.random(shape) < 0.5
            else:
                of_bytes = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
                arrays[f"{kind}.{dtype}"] = of_bytes.view(dtype)[..., 0]
    return arrays


def grid_of(layout: Layout) -> Grid:
    return make_grid(layout, jax.devices()[: layout.stage_size])


def packed_for(grid: Grid, arrays: dict[str, np.ndarray]) -> tuple[Packing, ...]:
    dims = {name: DIMS[name.split(".")[0]] for name in arrays}
    abstract = {k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=grid.sharding(dims[k])) for k, a in arrays.items()}
    return packings(abstract, {k: 1 for k in arrays if "seq" in dims[k] and grid.axes.cp.size > 1})


def arrived(grid: Grid, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The arrays behind a program that took them apart."""
    mine = packed_for(grid, arrays)
    placed = [p.place(p.pack(arrays)) for p in mine]
    specs = {name: grid.spec(DIMS[name.split(".")[0]]) for name in arrays}
    in_specs = ([p.sharding.spec for p in mine],)
    program = jax.shard_map(lambda words: unpack(mine, words), mesh=grid.mesh, in_specs=in_specs, out_specs=specs)
    return jax.jit(program)(placed)


def check(layout: Layout, *, wide: bool) -> None:
    arrays = microbatch(wide=wide)
    got = arrived(grid_of(layout), arrays)
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        if name.startswith("text") and layout.cp > 1:
            array = array[:, zigzag(array.shape[1], layout.cp)]
        assert got[name].dtype == array.dtype
        for shard in got[name].addressable_shards:  # those of replicas too
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(array[shard.index]).tobytes(), name


LAYOUTS = (Layout(), Layout(dp=4), Layout(dp=2, cp=2, tp=2), Layout(dp=2, copies=2, cp=2), Layout(cp=4))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_arrive_under_every_layout(layout: Layout) -> None:
    check(layout, wide=False)


def test_numbers_of_64_bits_arrive_where_jax_has_them(x64: None) -> None:
    check(Layout(dp=2, cp=2), wide=True)


def test_arrays_cut_alike_are_one() -> None:
    arrays = {k: a for k, a in microbatch(wide=False).items() if k.startswith("text")}
    (packing,) = packed_for(grid_of(Layout(dp=2, cp=2, tp=2)), arrays)
    assert packing.struct.shape == (2, 2, 24 + 24 + 6 + 6) and packing.axes == ("dp", "cp")


def test_types_that_jax_would_change_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'text\.float64' is float64; set jax_enable_x64, or make it a type of 32 bits"
    ):
        packed_for(grid_of(Layout()), {"text.float64": np.zeros((4, 24))})


@pytest.mark.parametrize("wrong", [np.zeros((4, 23), np.int32), np.zeros((4, 24), np.int64)], ids=["shape", "type"])
def test_a_microbatch_of_another_shape_is_refused(wrong: np.ndarray) -> None:
    (packing,) = packed_for(grid_of(Layout()), {"text.a": np.zeros((4, 24), np.int32)})
    with pytest.raises(ValueError, match=r"'text.a' is int.*, the trainer was built for int32\[4, 24\]; give it"):
        packing.pack({"text.a": wrong})


def test_a_step_takes_what_was_prepared_for_it_and_nothing_goes_to_the_host(
    host_fetches: Counter, compilations: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels are inputs of the backward and no residuals; what another trainer prepared is packed again."""
    shape = tiny.Shape(samples=2, groups=2, slots=4, microbatches=2)
    graph = tiny.graph(Layout(cp=2), {"vision": Layout(dp=2)}, jnp.float32, remat=Remat.FULL)
    trainer = tiny.trainer(graph, shape, OptimizerConfig(name="sgd"))
    assert not [a for s in trainer.pipeline.stages.values() for a in s.kept if a.shape[-3:] == (8, 8, 3)]
    data, again = tiny.microbatches(shape), trainer.init()
    _, plain = trainer.step(trainer.init(), [data[0], Prepared(data[1], {})])
    prepared = [trainer.prepare(m) for m in data]
    monkeypatch.setattr(Packing, "pack", lambda *_: pytest.fail("packed again"))
    host_fetches.reset()
    compilations.reset()
    _, outcome = trainer.step(again, prepared)
    assert not host_fetches.count and not compilations.count
    assert [float(outcome.loss), float(outcome.norm)] == [float(plain.loss), float(plain.norm)]
