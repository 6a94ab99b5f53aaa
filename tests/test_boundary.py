"""Boundaries between random pairs of layouts on eight devices: what arrives, what crosses, and what never happens."""

import concurrent.futures
import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Counter
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core import route
from hetjax.core.boundary import Boundary
from hetjax.core.put import Put

AXES = ("dp", "copies", "cp", "tp")
ITEMS, SEQ, WIDTH = 24, 12, 2
ARRAYS = {  # of every edge: shape and dtype
    "x": ((ITEMS, SEQ, WIDTH), jnp.float32),
    "half": ((ITEMS, SEQ), jnp.bfloat16),
    "ids": ((ITEMS, SEQ), jnp.int32),
}
GRADIENTS = ("x", "half")
SPECS = {"items": P("dp"), "batch": P("dp", "cp")}


@dataclasses.dataclass(frozen=True)
class Side:
    """A stage's devices, its layout (sizes of AXES) and what its arrays are split over (a key of SPECS)."""

    devices: tuple[int, ...]
    sizes: tuple[int, int, int, int]
    split: str = "items"

    def sharding(self, spec: P | None = None) -> NamedSharding:
        devices = np.array([jax.devices()[i] for i in self.devices]).reshape(self.sizes)
        return NamedSharding(Mesh(devices, AXES), SPECS[self.split] if spec is None else spec)

    def __str__(self) -> str:
        layout = "".join(f"{axis}{size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)
        return f"{self.split}.{layout or 'one'}@{''.join(map(str, self.devices))}"


Pair = tuple[Side, Side]


def name(pair: Pair) -> str:
    return f"{pair[0]}-{pair[1]}"


def side(first: int, dp: int, *, copies: int = 1, cp: int = 1, tp: int = 1, split: str = "items") -> Side:
    """A layout on consecutive devices."""
    return Side(tuple(range(first, first + dp * copies * cp * tp)), (dp, copies, cp, tp), split)


CHOSEN = [
    (side(0, 4), side(4, 4)),  # equal dp
    (side(0, 2, tp=2), side(4, 2, tp=2)),  # equal grids, each block twice
    (side(0, 4), side(4, 1)),  # fan-in
    (side(0, 4), side(4, 1, cp=2, tp=2)),
    (side(0, 1), side(4, 4)),  # fan-out
    (side(0, 1, tp=2), side(4, 4)),
    (side(0, 3), side(3, 2, tp=2)),  # 3 to 2
    (side(0, 6), side(6, 2)),  # 6 to 2
    (side(0, 8), side(0, 2, cp=2, tp=2)),  # colocated
    (side(0, 2, copies=4), side(0, 2, cp=2, tp=2)),  # the homogeneous layout: nothing moves
    (side(0, 2, cp=2, tp=2, split="batch"), side(0, 4, cp=2, split="batch")),
    (side(0, 2, tp=2, split="batch"), side(4, 2, cp=2, split="batch")),  # one pipeline stage to the next
    (side(2, 4), side(0, 2, tp=2)),  # overlapping
    (side(0, 6), side(2, 2, cp=3)),
    (side(0, 3, tp=2), side(0, 2, tp=3)),  # same devices, grids that do not nest
    (side(0, 1, cp=2, tp=3, split="batch"), side(0, 6)),  # on the way 3 x 2 to 6 x 1, which jax 0.12 cannot compile
    (Side((3, 1, 0, 2), (4, 1, 1, 1)), Side((0, 1, 2, 3), (2, 1, 2, 1))),  # same devices, other order
    (Side((1, 0), (2, 1, 1, 1)), Side((0, 1), (2, 1, 1, 1))),
]


def draw_pairs(relation: str, count: int) -> list[Pair]:
    """Random pairs of at most eight devices in all; sizes that divide ITEMS and SEQ."""
    rng = random.Random(relation)
    found: dict[Pair, None] = {}
    while len(found) < count:
        layouts = [tuple(rng.choice((1, 1, 2, 3)) for _ in AXES) for _ in range(2)]
        n, m = map(math.prod, layouts)
        order = rng.sample(range(8), 8)
        if relation == "same" and n == m and 1 < n <= 6:
            devices = sorted(order[:n]), sorted(order[:n])
        elif relation == "disjoint" and 3 <= n + m <= 8:
            devices = order[:n], order[n : n + m]
        elif relation == "overlapping" and max(n, m) <= 6:
            devices = order[:n], rng.sample(order[1 : m + 2], m)
        else:
            continue
        a, b = (Side(tuple(d), s, rng.choice(list(SPECS))) for d, s in zip(devices, layouts, strict=True))  # type: ignore[arg-type]
        if relation != "overlapping" or (set(a.devices) & set(b.devices) and set(a.devices) != set(b.devices)):
            found[a, b] = None
    return list(found)


PAIRS = [*CHOSEN, *draw_pairs("same", 7), *draw_pairs("disjoint", 9), *draw_pairs("overlapping", 8)]


def build(pair: Pair, arrays: Mapping[str, tuple[tuple[int, ...], Any]] = ARRAYS) -> Boundary:
    """The boundary of a pair, compiled as a trainer does it: in threads."""
    source, destination = (s.sharding() for s in pair)
    made = Boundary(
        {name: jax.ShapeDtypeStruct(shape, dtype, sharding=source) for name, (shape, dtype) in arrays.items()},
        dict.fromkeys(arrays, destination),
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda thunk: thunk(), [thunk for _, thunk in made.programs()]))
    return made


def values(seed: int) -> dict[str, np.ndarray]:
    """Random values, with some that arithmetic would change: negative zero, infinity, NaN, a subnormal."""
    rng = np.random.default_rng(seed)
    odd = np.array([-0.0, np.inf, np.nan, 1e-40])
    drawn = {name: np.asarray(rng.normal(size=shape) * 1000, dtype) for name, (shape, dtype) in ARRAYS.items()}
    for name in GRADIENTS:
        drawn[name].reshape(-1)[rng.choice(drawn[name].size, 4, replace=False)] = odd
    return drawn


def place(tree: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jax.block_until_ready(jax.device_put(array, like[name].sharding)) for name, array in tree.items()}


def assert_same(
    got: Mapping[str, jax.Array], want: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Every device's shard, bit for bit, and that it lies where it was promised."""
    for name, array in got.items():
        assert array.sharding == like[name].sharding and array.dtype == want[name].dtype
        assert [s.device for s in array.addressable_shards] == list(like[name].sharding.mesh.devices.flat)
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == want[name][shard.index].tobytes(), (name, shard.device)


@dataclasses.dataclass
class Wire:
    """Counts the bytes that any put of a boundary takes to another device."""

    moved: int = 0


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    counted, plain = Wire(), Put.__call__

    def put(self: Put, pieces: Sequence[jax.Array]) -> jax.Array:
        ends = zip(pieces, self.devices, strict=True)
        counted.moved += sum(piece.nbytes for piece, device in ends if piece.device != device)
        return plain(self, pieces)

    monkeypatch.setattr(Put, "__call__", put)
    return counted


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_values_arrive_bit_exact_both_ways_without_host_or_compiler(
    pair: Pair, wire: Wire, host_fetches: Counter, compilations: Counter
) -> None:
    edge = build(pair)
    x, g = values(1), {name: values(2)[name] for name in GRADIENTS}
    there, back = place(x, edge.source), place(g, edge.destination)
    compilations.reset()
    host_fetches.reset()
    wire.moved = 0
    y = edge.forward(there)
    forward_bytes, wire.moved = wire.moved, 0
    gx = edge.backward(back)
    backward_bytes = wire.moved
    jax.block_until_ready((y, gx))
    assert (compilations.count, host_fetches.count) == (0, 0)
    assert_same(y, x, edge.destination)
    assert_same(gx, g, edge.source)
    assert forward_bytes == edge.wire_bytes
    if set(pair[0].devices).isdisjoint(pair[1].devices):
        assert forward_bytes == edge.payload_bytes == sum(array.nbytes for array in x.values())
        assert backward_bytes == sum(array.nbytes for array in g.values())
    elif pair[0].devices == pair[1].devices and len(edge.programs()) <= 2:
        assert forward_bytes == 0  # a collective, or nothing at all
    else:
        assert edge.payload_bytes <= forward_bytes <= sum(array.nbytes for array in x.values())


def test_the_pairs_cover_what_they_claim() -> None:
    ratios = {(a.sizes[0], b.sizes[0]) for a, b in PAIRS}
    assert len(PAIRS) >= 40 and len(set(PAIRS)) == len(PAIRS)
    assert ratios >= {(3, 2), (6, 2), (4, 1), (1, 4), (4, 4)}
    assert {(a.split, b.split) for a, b in PAIRS} == {(a, b) for a in SPECS for b in SPECS}


def test_a_layout_that_moves_nothing_runs_no_program() -> None:
    edge = build((side(0, 2, copies=4), side(0, 2, cp=2, tp=2)))
    x = place(values(0), edge.source)
    y = edge.forward(x)
    assert edge.programs() == [] and edge.payload_bytes == 0
    pointers = [[s.data.unsafe_buffer_pointer() for s in tree["x"].addressable_shards] for tree in (x, y)]
    assert pointers[0] == pointers[1]


@pytest.mark.parametrize(
    "pair", [(side(0, 3), side(3, 2, tp=2)), (side(0, 1), side(4, 4)), (side(0, 4), side(2, 2, cp=2))], ids=name
)
def test_vjp_of_a_boundary_is_its_mirror(pair: Pair) -> None:
    edge = build(pair)
    x, g = values(3), {name: values(4)[name] for name in GRADIENTS}
    y, pull = jax.vjp(edge, place(x, edge.source))
    no_gradient = np.zeros((ITEMS, SEQ), jax.dtypes.float0)
    (gx,) = pull({**place(g, edge.destination), "ids": no_gradient})
    assert_same(y, x, edge.destination)
    assert_same({name: gx[name] for name in GRADIENTS}, g, edge.source)
    assert gx["ids"].dtype == jax.dtypes.float0


@pytest.mark.parametrize(
    "pair", [(side(0, 6), side(6, 2)), (side(0, 2), side(2, 6)), (side(0, 8), side(0, 2, tp=4))], ids=name
)
def test_each_sample_finds_its_own_item_by_global_row(pair: Pair) -> None:
    """An encoder whose rows ARE their item's id; a consumer that gathers by a host-made index, as models do."""
    rows = 3
    edge = build(pair, {"x": ((ITEMS, rows, 1), jnp.float32)})
    destination = pair[1].sharding()
    items = ITEMS // pair[0].sizes[0]

    def encode(pixels: jax.Array) -> jax.Array:
        slot = jax.lax.axis_index("dp") * items + jnp.arange(items)
        return pixels + (slot[:, None] * rows + jnp.arange(rows)[None]).astype(jnp.float32)[..., None]

    def merge(x: jax.Array, index: jax.Array) -> jax.Array:
        local = x.reshape(-1, 1)
        start = jax.lax.axis_index("dp") * local.shape[0]
        found = jnp.take(local, jnp.clip(index - start, 0, local.shape[0] - 1), axis=0)[..., 0]
        return jnp.where((index >= start) & (index < start + local.shape[0]), found, -1)

    source = pair[0].sharding()
    encoder = jax.jit(jax.shard_map(encode, mesh=source.mesh, in_specs=P("dp"), out_specs=P("dp")))
    consumer = jax.shard_map(merge, mesh=destination.mesh, in_specs=(P("dp"), P("dp")), out_specs=P("dp"))
    x = encoder(jax.device_put(np.zeros((ITEMS, rows, 1), np.float32), source))
    samples = 12  # two items each, in any order
    index = np.arange(ITEMS * rows, dtype=np.int32).reshape(samples, -1)
    index = np.random.default_rng(0).permuted(index, axis=1)
    index[:, 0] = -1
    got = jax.jit(consumer)(edge.forward({"x": x})["x"], jax.device_put(index, destination))
    np.testing.assert_array_equal(np.asarray(got), index)


def test_forward_returns_before_the_producer_is_done() -> None:
    edge = build((side(0, 3), side(3, 2, tp=2)), {"x": ((ITEMS, SEQ), jnp.float32)})
    source = edge.source["x"].sharding

    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 100, lambda _, a: jnp.sin(a) @ jnp.eye(SEQ), jnp.tile(x, (2000, 1)))[: x.shape[0]]

    slow_here = jax.jit(jax.shard_map(slow, mesh=source.mesh, in_specs=P("dp"), out_specs=P("dp"), check_vma=False))
    x = jax.device_put(np.ones((ITEMS, SEQ), np.float32), source)
    jax.block_until_ready(edge.forward({"x": slow_here(x)}))
    start = time.perf_counter()
    y = edge.forward({"x": slow_here(x)})["x"]
    host = time.perf_counter() - start
    assert not y.is_ready()
    y.block_until_ready()
    assert host < (time.perf_counter() - start) / 2


def test_equal_edges_share_their_programs_and_compile_them_once(compilations: Counter) -> None:
    first, second = build((side(0, 3), side(3, 2))), build((side(0, 3), side(3, 2)))
    compilations.reset()
    programs = [thunk() for _, thunk in first.programs()]
    assert compilations.count == 0
    assert all(one is other() for one, (_, other) in zip(programs, second.programs(), strict=True))


def test_threads_that_compile_the_same_program_get_one_executable() -> None:
    program = route.Program("double", lambda x: (x * 2,), (jax.ShapeDtypeStruct((3,), jnp.float32),), None)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(lambda _: program.compile(), range(8)))
    assert len({id(one) for one in compiled}) == 1


def test_colocated_reshards_never_copy_the_whole_array_onto_a_device() -> None:
    edge = build((side(0, 8), side(0, 2, cp=2, tp=2, split="batch")))
    for label, thunk in edge.programs():
        assert label.endswith("reshard")
        assert f"f32[{ITEMS},{SEQ},{WIDTH}]" not in thunk().as_text()


def test_a_colocated_fan_in_is_one_all_gather_and_its_mirror_sends_nothing() -> None:
    edge = build((side(0, 8), side(0, 2, cp=2, tp=2)), {"x": ARRAYS["x"]})
    used = []
    for _, thunk in edge.programs():
        text = thunk().as_text()
        used.append({c for c in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if f" {c}(" in text})
    assert used == [{"all-gather"}, set()]


@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (2,), (7, 2, 2)], ids=str)
def test_replicas_share_what_they_do_not_divide(shape: tuple[int, ...]) -> None:
    replicated = side(1, 1, copies=3).sharding()
    edge = Boundary({"x": abstract(side(0, 1), shape)}, {"x": replicated})
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = edge.forward(place({"x": x}, edge.source))
    assert_same(y, {"x": x}, edge.destination)
    assert_same(edge.backward(y), {"x": x}, edge.source)
    assert edge.wire_bytes == x.nbytes


def abstract(where: Side, shape: tuple[int, ...] = (ITEMS, SEQ)) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where.sharding())


A, B = side(0, 2), side(2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Boundary({}, {}), r"source has arrays \[\], destination \[\]; both need the same, at least one"),
        (lambda: Boundary({"x": abstract(A)}, {"y": B.sharding()}), r"arrays \['x'\], destination \['y'\]"),
        (
            lambda: Boundary({"x": abstract(A, (10, SEQ))}, {"x": B.sharding()}),
            r"destination 'x' of shape \[10, 12\] cannot be split 4 ways over \('dp',\) on dim 0; choose sizes that",
        ),
        (
            lambda: Boundary({"x": abstract(A, (7, SEQ))}, {"x": B.sharding()}),
            r"source 'x' of shape \[7, 12\] cannot be split 2 ways",
        ),
        (
            lambda: Boundary({"x": abstract(A, (4,))}, {"x": B.sharding(P("dp", "cp"))}),
            r"destination 'x' has 1 dims and the longer .*; name no more dims",
        ),
        (
            lambda: Boundary({"x": jax.ShapeDtypeStruct((4,), jnp.float32)}, {"x": B.sharding()}),
            "source 'x' has sharding None; give it a NamedSharding",
        ),
        (
            lambda: Boundary({"x": abstract(A), "y": abstract(B)}, dict.fromkeys("xy", B.sharding())),
            "the source arrays are on 2 meshes; an edge joins two stages, one mesh each",
        ),
    ],
)
def test_an_edge_that_no_route_carries_is_refused(make: Callable[[], Boundary], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_other_than_those_it_was_built_for_are_refused() -> None:
    edge = Boundary({"x": abstract(A)}, {"x": B.sharding()})

    def put(dtype: Any = np.float32, rows: int = ITEMS, where: Side = A, spec: P | None = None) -> dict[str, jax.Array]:
        return {"x": jax.device_put(np.ones((rows, SEQ), dtype), where.sharding(spec))}

    with pytest.raises(ValueError, match=r"got arrays \['z'\], was built for \['x'\]; pass exactly those"):
        edge.forward({"z": put()["x"]})
    with pytest.raises(
        ValueError, match=r"'x' is float32\[48, 12\], was built for float32\[24, 12\]; build a boundary"
    ):
        edge.forward(put(rows=48))
    with pytest.raises(ValueError, match=r"'x' is int32\[24, 12\], was built for float32\[24, 12\]"):
        edge.forward(put(np.int32))
    with pytest.raises(ValueError, match=r"'x' arrives as .*, was built for .*; pin the producer's out_shardings"):
        edge.forward(put(where=B))
    with pytest.raises(ValueError, match="'x' arrives as"):
        edge.forward(put(spec=P(None, "dp")))
    with pytest.raises(ValueError, match="'x' arrives as"):
        edge.backward(put())
