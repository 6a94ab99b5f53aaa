"""Activations forward and gradients back between the layouts of two stages.

A boundary moves values between two shardings and never changes one: the backward is the same transfer with source and
destination swapped, exact to the bit, so a gradient arrives as it left whatever the two sizes of dp. It never touches
the host and compiles nothing after `programs` ran.

An edge carries a dict of arrays. For a vision encoder on devices 0-2 (dp=3) and an LLM on 3-6 (dp=2, tp=2):

    boundary = Boundary({"x": jax.ShapeDtypeStruct((12, 576, 4096), bf16, sharding=vision)}, {"x": llm})
    for name, compile in boundary.programs(): compile()
    y = boundary.forward({"x": x})             # or, for jax to call the mirror: y, pull = jax.vjp(boundary, {"x": x})
    gradient = boundary.backward({"x": gy})

The outputs may share buffers with the inputs (what is in place already is not copied): donate neither.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, Sharding

from hetjax.core import processes, wire
from hetjax.core.mesh import axis_names
from hetjax.core.put import Put
from hetjax.core.route import Leaf, Program, Route, landing
from hetjax.core.transfer import Pieces

Tree = dict[str, jax.Array]


class Boundary:
    """The transfer of one edge, from arrays like those in `source` to the shardings in `destination`.

    Floating-point arrays have gradients, which `backward` takes and returns; integer arrays only go forward.
    `donated`: what it is given may be donated before it has arrived in another process, and is copied first there.
    The attributes `source` and `destination` are the abstract arrays of both sides, with their shardings.
    """

    def __init__(
        self,
        source: Mapping[str, jax.ShapeDtypeStruct],
        destination: Mapping[str, NamedSharding],
        *,
        donated: bool = False,
    ) -> None:
        _check_edge(source, destination)
        leaves = {
            name: Leaf(tuple(struct.shape), np.dtype(struct.dtype), struct.sharding, destination[name], donated)
            for name, struct in sorted(source.items())
        }
        mirrors = {name: leaf.mirror for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        self.source = {name: _abstract(leaf) for name, leaf in leaves.items()}
        self.destination = {name: _abstract(leaf.mirror) for name, leaf in leaves.items()}
        self.gradients = tuple(mirrors)  # names of the arrays that have one
        self.payload_bytes = sum(wire.payload(leaf.held, leaf.wanted) * leaf.dtype.itemsize for leaf in leaves.values())
        self._forward = make_route(tuple(leaves.values()))
        self._backward = make_route(tuple(mirrors.values()))
        self._differentiable = jax.custom_vjp(self.forward)
        self._differentiable.defvjp(lambda tree: (self.forward(tree), None), lambda _, tree: (self._pull(tree),))

    @property
    def wire_bytes(self) -> int:
        """Bytes that are put from one device to another, forward: `payload_bytes` where the two sides are disjoint.

        (The payload is what no device which wants it holds, so that it must cross however it is done.) Collectives of a
        colocated edge are not counted. Overlapping edges may put more than the payload: replicas that hold a block
        already send each other the parts that each lands, before the destination gathers."""
        return self._forward.wire_bytes

    def crosses(self, *, backward: bool = False) -> bool:
        """Whether something goes from one process to another, in which all take part."""
        return (self._backward if backward else self._forward).crosses

    def programs(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, thunk) of every program; a thunk compiles one ahead of time, and may run in any thread."""
        routes = {"forward": self._forward, "backward": self._backward}
        return [
            (f"{way} {program.name}", program.compile) for way, route in routes.items() for program in route.programs
        ]

    def forward(self, tree: Mapping[str, jax.Array] | None) -> Tree:
        """The same values on the destination's shardings; returns before they have arrived. None: they are those of
        other processes, since this one drives none of the source's devices."""
        return _run(self._forward, self.source, self._absent_source if tree is None else tree)

    def backward(self, tree: Mapping[str, jax.Array] | None) -> Tree:
        """The gradients of `forward`'s floating-point inputs, on the source's shardings, from those of its outputs;
        None: they are those of other processes."""
        inputs = {name: self.destination[name] for name in self.gradients}
        return _run(self._backward, inputs, self._absent_gradients if tree is None else tree)

    def __call__(self, tree: Mapping[str, jax.Array]) -> Tree:
        """`forward`, whose VJP is `backward`. Call it outside of jit: a boundary is several programs."""
        return self._differentiable(dict(tree))

    @functools.cached_property
    def _absent_source(self) -> Tree:
        return jax.tree.map(processes.elsewhere, self.source)

    @functools.cached_property
    def _absent_gradients(self) -> Tree:
        return {name: processes.elsewhere(self.destination[name]) for name in self.gradients}

    def _pull(self, tree: Mapping[str, jax.Array]) -> dict[str, jax.Array | None]:
        """`backward` with None, which jax reads as no gradient, for the arrays that have none."""
        moved = self.backward({name: tree[name] for name in self.gradients})
        return {name: moved.get(name) for name in self.source}


@functools.cache
def make_route(leaves: tuple[Leaf, ...]) -> Route:
    """The cheapest route that stays off the host; cached, so that equal edges share their programs.

    - Arrays whose blocks are where they are wanted are wrapped in their new sharding. All others together take one of:
    - colocated (same devices in the same order, grids that nest): one jitted reshard;
    - equal grids on disjoint devices of this process (position by position the same block, no replicas): each shard is
      put on its device;
    - anything else: in pieces.

    A process that drives no device of either side does nothing, but for what it takes to let others send.
    """
    moves = [leaf.held != leaf.wanted for leaf in leaves]
    moving = tuple(itertools.compress(leaves, moves))
    route = _route_of_moving(moving)
    if not route.crosses and not processes.owns_some(_devices(leaves)):
        return Route(lambda arrays: [processes.elsewhere(leaf.landed) for leaf in leaves], (), route.wire_bytes)

    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        moved = iter(route.run(list(itertools.compress(arrays, moves))))
        return [
            next(moved) if moves_ else _wrap(array, leaf.destination)
            for array, leaf, moves_ in zip(arrays, leaves, moves, strict=True)
        ]

    return dataclasses.replace(route, run=run) if not all(moves) else route


def _route_of_moving(leaves: tuple[Leaf, ...]) -> Route:
    if not leaves:
        return Route(list, (), 0)
    source, destination = list(leaves[0].held), list(leaves[0].wanted)
    if source == destination and all(map(_grids_nest, leaves)):
        return _colocated(leaves)
    if (
        all(map(processes.is_mine, _devices(leaves)))
        and set(source).isdisjoint(destination)
        and all(map(_equal_grids, leaves))
    ):
        puts = [Put(leaf.landed) for leaf in leaves]
        size = sum(wire.payload(leaf.held, leaf.wanted) * leaf.dtype.itemsize for leaf in leaves)
        return Route(lambda arrays: [put(_shards(a)) for put, a in zip(puts, arrays, strict=True)], (), size)
    return Pieces(leaves).route()


def _devices(leaves: Sequence[Leaf]) -> list[jax.Device]:
    """Those of both sides."""
    return [
        device for leaf in leaves[:1] for side in (leaf.source, leaf.destination) for device in side.mesh.devices.flat
    ]


def _wrap(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`array`, in place, under another name for how it is laid out."""
    return jax.make_array_from_single_device_arrays(array.shape, sharding, _shards(array), dtype=array.dtype)


def _shards(array: jax.Array) -> list[jax.Array]:
    """Those of this process."""
    return [shard.data for shard in array.addressable_shards]


def _equal_grids(leaf: Leaf) -> bool:
    """Whether both sides hold the same blocks at the same positions, each once (a put would send replicas too)."""
    held, wanted = list(leaf.held.values()), list(leaf.wanted.values())
    return held == wanted and len(set(held)) == len(held)


def _colocated(leaves: tuple[Leaf, ...]) -> Route:
    """One jitted reshard; nothing is put, so no byte counts as wire."""
    stops = [(*_stops(leaf), leaf.destination) for leaf in leaves]

    def reshard(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            functools.reduce(lax.with_sharding_constraint, through, array)
            for array, through in zip(arrays, stops, strict=True)
        )

    program = Program("reshard", reshard, tuple(map(_abstract, leaves)), tuple(leaf.destination for leaf in leaves))
    return Route(lambda arrays: list(program.compile()(*arrays)), (program,), 0)


def _stops(leaf: Leaf) -> tuple[NamedSharding, ...]:
    """The shardings in which an array is whole once per mesh, between which XLA needs no copy of it per device.

    Told the two ends alone, XLA gathers the whole array on every device (`Involuntary full rematerialization`) where
    both the grid and the replicas change: dp=8 to dp=2, cp=2, tp=2 is an exchange and an all-gather this way. Where one
    end is whole on every device there is nothing to exchange.
    """
    if leaf.source.is_fully_replicated or leaf.destination.is_fully_replicated:
        return ()
    back = landing(leaf.mirror, wire.plan(leaf.wanted, leaf.held))
    there = landing(leaf, wire.plan(leaf.held, leaf.wanted))
    return tuple(stop.sharding for stop in (back, there) if stop.shape == leaf.shape)


def _grids_nest(leaf: Leaf) -> bool:
    """Whether XLA reshards between the grids by exchanges: per dim, one block size is a multiple of the other.

    And where one dim gets coarser and another finer, all counts of blocks are powers of two: from 3 x 2 to 6 x 1 the
    compiler of jax 0.12 aborts the process (`Could not slice dimension`).
    """
    ends = (leaf.source, *_stops(leaf), leaf.destination)
    counts = [
        [whole // part for whole, part in zip(leaf.shape, sharding.shard_shape(leaf.shape), strict=True)]
        for sharding in ends
    ]
    return all(_exchangeable(one, two) for one, two in itertools.pairwise(counts))


def _exchangeable(one: list[int], two: list[int]) -> bool:
    """Whether XLA exchanges between two grids, given the number of blocks along each dim."""
    pairs = list(zip(one, two, strict=True))
    opposed = any(a < b for a, b in pairs) and any(a > b for a, b in pairs)
    even = all(n.bit_count() == 1 for n in (*one, *two))
    return all(max(pair) % min(pair) == 0 for pair in pairs) and (even or not opposed)


def _abstract(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """What comes in on the source's side of a leaf."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.source)


def _run(route: Route, inputs: Mapping[str, jax.ShapeDtypeStruct], tree: Mapping[str, jax.Array]) -> Tree:
    """`tree` through `route`, after a check that each array is what the route's programs were compiled for."""
    if tree.keys() != inputs.keys():
        raise ValueError(f"boundary: got arrays {sorted(tree)}, was built for {sorted(inputs)}; pass exactly those")
    for name, struct in inputs.items():
        array = tree[name]
        if array.shape != struct.shape or array.dtype != struct.dtype:
            raise ValueError(
                f"boundary: {name!r} is {array.dtype}{list(array.shape)}, was built for "
                f"{struct.dtype}{list(struct.shape)}; build a boundary per shape"
            )
        if not _equivalent(array.sharding, struct.sharding, array.ndim):
            raise ValueError(
                f"boundary: {name!r} arrives as {array.sharding}, was built for {struct.sharding}; "
                "pin the producer's out_shardings (or out_specs) to the boundary's source"
            )
    return dict(zip(inputs, route.run([tree[name] for name in inputs]), strict=True))


@functools.cache
def _equivalent(one: Sharding, other: Sharding, ndim: int) -> bool:
    """Asked with the same pairs in every step: jax compares them anew each time."""
    return one.is_equivalent_to(other, ndim)


def _check_edge(source: Mapping[str, jax.ShapeDtypeStruct], destination: Mapping[str, NamedSharding]) -> None:
    """Refuses an edge that no route carries."""
    if not source or source.keys() != destination.keys():
        raise ValueError(
            f"boundary: source has arrays {sorted(source)}, destination {sorted(destination)}; both need the same, "
            "at least one"
        )
    shapes = {name: tuple(struct.shape) for name, struct in source.items()}
    _check_side("source", shapes, {name: struct.sharding for name, struct in source.items()})
    _check_side("destination", shapes, destination)


def _check_side(side: str, shapes: Mapping[str, tuple[int, ...]], shardings: Mapping[str, object]) -> None:
    meshes = set()
    for name, sharding in shardings.items():
        if not isinstance(sharding, NamedSharding):
            raise ValueError(f"boundary: {side} {name!r} has sharding {sharding}; give it a NamedSharding")
        _check_divides(f"{side} {name!r}", shapes[name], sharding)
        meshes.add(sharding.mesh)
    if len(meshes) > 1:
        raise ValueError(
            f"boundary: the {side} arrays are on {len(meshes)} meshes; an edge joins two stages, one mesh each"
        )


def _check_divides(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    if len(sharding.spec) > len(shape):
        raise ValueError(f"boundary: {name} has {len(shape)} dims and the longer {sharding.spec}; name no more dims")
    for dim, entry in enumerate(sharding.spec):
        axes = axis_names(entry)
        ways = math.prod(sharding.mesh.shape[axis] for axis in axes)
        if shape[dim] % ways:
            raise ValueError(
                f"boundary: {name} of shape {list(shape)} cannot be split {ways} ways over {axes} on dim {dim}; "
                "choose sizes that divide"
            )
