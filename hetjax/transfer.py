"""Compiled programs that carry arrays from one mesh's sharding to another's, without touching the host.

`wire.py` says which pieces cross; this file runs them. One of three routes is chosen per edge, for all its arrays:

- colocated (same devices in the same order, grids that nest): one jitted reshard, nothing at all for arrays already laid out as wanted;
- equal grids on disjoint devices (position by position the same block, no replicas): one plain `jax.device_put`;
- anything else: static slices on each source device, ONE batched `device_put` of all pieces, a join on each destination
  device, and one all-gather inside the destination mesh where it wants replicas.

`jax.device_put` is direct and asynchronous only for the second case and for single-device pieces; between other
shardings (also: the same devices in another order) it pulls the array through numpy and blocks the host. Programs are
per device because a call of one costs 5 us of host time and of a mesh-wide one 70 us (8 emulated CPU devices).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hetjax import wire


def blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[int, wire.Box]:
    """The block of each device of `sharding`, by device id, in the mesh's order."""
    indices = sharding.devices_indices_map(shape)
    return {
        device.id: tuple(part.indices(size)[:2] for part, size in zip(indices[device], shape, strict=True))
        for device in sharding.mesh.devices.flat
    }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an edge: its type and both of its shardings. All leaves of an edge share their two meshes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    source: NamedSharding
    destination: NamedSharding

    @property
    def mirror(self) -> "Leaf":
        """The leaf of the way back."""
        return dataclasses.replace(self, source=self.destination, destination=self.source)

    @functools.cached_property
    def held(self) -> dict[int, wire.Box]:
        """Device id -> block, on the source."""
        return blocks(self.source, self.shape)

    @functools.cached_property
    def wanted(self) -> dict[int, wire.Box]:
        """Device id -> block, on the destination."""
        return blocks(self.destination, self.shape)


@dataclasses.dataclass
class Program:
    """A function compiled ahead of time for inputs of fixed type and place."""

    name: str
    function: Callable[..., tuple[jax.Array, ...]]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    out_shardings: Any
    compiled: jax.stages.Compiled | None = None

    def compile(self) -> jax.stages.Compiled:
        """The executable; compiled by the first call, here or through the thunks of `Boundary.programs`."""
        if self.compiled is None:
            lowered = jax.jit(self.function, out_shardings=self.out_shardings).lower(*self.inputs)
            self.compiled = lowered.compile()
        return self.compiled


@dataclasses.dataclass(frozen=True)
class Route:
    """One direction of an edge: `run` takes and returns its arrays in the order of the leaves."""

    run: Callable[[list[jax.Array]], list[jax.Array]]
    programs: tuple[Program, ...]
    payload_bytes: int
    wire_bytes: int


@functools.cache
def make_route(leaves: tuple[Leaf, ...]) -> Route:
    """The cheapest route that stays off the host; cached, so that equal edges share their programs."""
    payload_bytes = sum(wire.payload(leaf.held, leaf.wanted) * leaf.dtype.itemsize for leaf in leaves)
    source, destination = list(leaves[0].held), list(leaves[0].wanted)
    if source == destination and all(map(_grids_nest, leaves)):
        return _colocated(leaves, payload_bytes)
    if set(source).isdisjoint(destination) and all(map(_equal_grids, leaves)):
        shardings = [leaf.destination for leaf in leaves]
        return Route(lambda arrays: jax.device_put(arrays, shardings), (), payload_bytes, payload_bytes)
    return _Pieces(leaves).route(payload_bytes)


def _equal_grids(leaf: Leaf) -> bool:
    """Whether both sides hold the same blocks at the same positions, each once (a put would send replicas too)."""
    held, wanted = list(leaf.held.values()), list(leaf.wanted.values())
    return held == wanted and len(set(held)) == len(held)


def _colocated(leaves: tuple[Leaf, ...], payload_bytes: int) -> Route:
    """One jitted reshard of the arrays whose blocks change; nothing is put, so no byte counts as wire."""
    changing = [index for index, leaf in enumerate(leaves) if leaf.source != leaf.destination]
    if not changing:
        return Route(list, (), payload_bytes, 0)
    stops = [_stops(leaves[index]) for index in changing]

    def reshard(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            functools.reduce(lax.with_sharding_constraint, through, array)
            for array, through in zip(arrays, stops, strict=True)
        )

    inputs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.source) for leaf in leaves]
    outputs = tuple(leaves[index].destination for index in changing)
    program = Program("reshard", reshard, tuple(inputs[index] for index in changing), outputs)

    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        out = list(arrays)
        for index, array in zip(changing, program.compile()(*[arrays[index] for index in changing]), strict=True):
            out[index] = array
        return out

    return Route(run, (program,), payload_bytes, 0)


def _stops(leaf: Leaf) -> tuple[NamedSharding, ...]:
    """The shardings in which an array is whole once per mesh, between which XLA needs no copy of it per device.

    Told the two ends alone, XLA gathers the whole array on every device (`Involuntary full rematerialization`) where
    both the grid and the replicas change: dp=8 to dp=2, cp=2, tp=2 is an all-to-all and an all-gather this way.
    """
    there, back = wire.plan(leaf.held, leaf.wanted), wire.plan(leaf.wanted, leaf.held)
    stops = (_landing(leaf.mirror, back), _landing(leaf, there))
    return tuple(stop.sharding for stop in stops if stop.shape == leaf.shape)


def _grids_nest(leaf: Leaf) -> bool:
    """Whether XLA reshards between the grids by exchanges: per dim, one block size is a multiple of the other."""
    ends = (leaf.source, *_stops(leaf), leaf.destination)
    shapes = [sharding.shard_shape(leaf.shape) for sharding in ends]
    return all(
        max(a, b) % min(a, b) == 0 for one, two in itertools.pairwise(shapes) for a, b in zip(one, two, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One single-device program of the pieces route; inputs are places in the list of all values of a call."""

    program: Program
    inputs: tuple[int, ...]


class _Pieces:
    """Builds the pieces route.

    Every single-device array of a call gets a place in one list, fixed here: the source's shards, what the cuts return,
    what was put, what the joins return. A call does no more than fill that list, wrap its end and gather.
    """

    def __init__(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves = leaves
        self.wires = [wire.plan(leaf.held, leaf.wanted) for leaf in leaves]
        self.landings = [_landing(leaf, crossing) for leaf, crossing in zip(leaves, self.wires, strict=True)]
        meshes = (leaves[0].source.mesh, leaves[0].destination.mesh)
        self.devices = {device.id: device for mesh in meshes for device in mesh.devices.flat}
        self.size = 0
        self.taken: dict[tuple[int, int, wire.Box], int] = {}  # (leaf, sender, box in its block) -> place
        self.got: dict[tuple[int, int], list[tuple[wire.Box, int]]] = {}  # (leaf, receiver) -> (box in landing, place)
        self.landed: dict[tuple[int, int], int] = {}  # (leaf, receiver) -> place
        for index, leaf in enumerate(leaves):
            for device in leaf.held:
                self.taken[index, device, self._whole(index, device)] = self._next()

    def route(self, payload_bytes: int) -> Route:
        """The finished route."""
        cuts, sends, joins = self._cuts(), self._sends(), self._joins()
        origins, receivers = [place for place, _ in sends], [device for _, device in sends]
        wraps = [
            (landing.shape, landing.sharding, [self.landed[index, device] for device in leaf.wanted])
            for index, (leaf, landing) in enumerate(zip(self.leaves, self.landings, strict=True))
        ]
        shared = [index for index, crossing in enumerate(self.wires) if crossing.dim is not None]
        gather = self._gather(shared)

        def run(arrays: list[jax.Array]) -> list[jax.Array]:
            values = [shard.data for array in arrays for shard in array.addressable_shards]
            for step in cuts:
                values += step.program.compile()(*[values[place] for place in step.inputs])
            values += jax.device_put([values[place] for place in origins], receivers)
            for step in joins:
                values += step.program.compile()(*[values[place] for place in step.inputs])
            out = [
                jax.make_array_from_single_device_arrays(shape, sharding, [values[place] for place in places])
                for shape, sharding, places in wraps
            ]
            if shared:
                for index, array in zip(shared, gather.compile()(*[out[index] for index in shared]), strict=True):
                    out[index] = array
            return out

        programs = (*(step.program for step in (*cuts, *joins)), *([gather] if shared else []))
        moved = sum(crossing.moved * leaf.dtype.itemsize for crossing, leaf in zip(self.wires, self.leaves, strict=True))
        return Route(run, programs, payload_bytes, moved)

    def _next(self) -> int:
        self.size += 1
        return self.size - 1

    def _whole(self, index: int, device: int) -> wire.Box:
        block = self.leaves[index].held[device]
        return wire.relative(block, block)

    def _program(
        self, name: str, function: Callable[..., Any], inputs: Sequence[tuple[int, wire.Box]], device: int
    ) -> Program:
        """`function` on one device, of inputs that have the size of a box of a leaf."""
        place = SingleDeviceSharding(self.devices[device])
        structs = tuple(
            jax.ShapeDtypeStruct([stop - start for start, stop in box], self.leaves[index].dtype, sharding=place)
            for index, box in inputs
        )
        return Program(f"{name} on {device}", function, structs, place)

    def _cuts(self) -> list[Step]:
        """One program per source device with all of its slices; a piece that is a whole shard needs none."""
        slices: dict[int, dict[tuple[int, wire.Box], None]] = {}  # the inner dict is an ordered set
        for index, crossing in enumerate(self.wires):
            for piece in crossing.pieces:
                if (index, piece.sender, piece.take) not in self.taken:
                    slices.setdefault(piece.sender, {})[index, piece.take] = None
        steps = []
        for device, boxes in slices.items():
            needed = sorted({index for index, _ in boxes})
            shards = [(index, self._whole(index, device)) for index in needed]
            function = functools.partial(_cut, boxes=tuple((needed.index(index), box) for index, box in boxes))
            places = tuple(self.taken[index, device, box] for index, box in shards)
            steps.append(Step(self._program("cut", function, shards, device), places))
            for index, box in boxes:
                self.taken[index, device, box] = self._next()
        return steps

    def _sends(self) -> list[tuple[int, jax.Device]]:
        """Place and receiver of every piece that leaves its device."""
        sends = []
        for index, crossing in enumerate(self.wires):
            for piece in crossing.pieces:
                place = self.taken[index, piece.sender, piece.take]
                if piece.sender != piece.receiver:
                    sends.append((place, self.devices[piece.receiver]))
                    place = self._next()
                self.got.setdefault((index, piece.receiver), []).append((piece.place, place))
        return sends

    def _joins(self) -> list[Step]:
        """One program per destination device that makes its landings; a landing that is one piece needs none."""
        steps = []
        for device in self.leaves[0].wanted:
            parts: list[tuple[tuple[int, ...], np.dtype, tuple[wire.Box, ...]]] = []
            inputs: list[tuple[int, wire.Box]] = []
            places: list[int] = []
            for index, (leaf, landing) in enumerate(zip(self.leaves, self.landings, strict=True)):
                shape = landing.sharding.shard_shape(landing.shape)
                got = self.got.get((index, device), [])
                if [box for box, _ in got] == [tuple((0, size) for size in shape)]:
                    self.landed[index, device] = got[0][1]
                    continue
                parts.append((shape, leaf.dtype, tuple(box for box, _ in got)))
                inputs += [(index, box) for box, _ in got]
                places += [place for _, place in got]
                self.landed[index, device] = self._next()
            if parts:
                function = functools.partial(_join, parts=tuple(parts))
                steps.append(Step(self._program("join", function, inputs, device), tuple(places)))
        return steps

    def _gather(self, shared: Sequence[int]) -> Program:
        """One program on the destination mesh that completes the blocks whose replicas received parts of them."""
        mesh = self.leaves[0].destination.mesh
        inputs = tuple(self.landings[index] for index in shared)
        dims = [self.wires[index].dim for index in shared]
        sizes = [self.leaves[index].destination.shard_shape(self.leaves[index].shape) for index in shared]
        axes = [_free_axes(self.leaves[index].destination) for index in shared]
        out = tuple(self.leaves[index].destination for index in shared)

        def gather(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            whole = [lax.all_gather(a, names, axis=dim, tiled=True) for a, names, dim in zip(arrays, axes, dims, strict=True)]
            return tuple(
                lax.slice_in_dim(a, 0, size[dim], axis=dim) for a, size, dim in zip(whole, sizes, dims, strict=True)
            )

        # The result is the same on all replicas, which shard_map cannot see from an all_gather: no check.
        function = jax.shard_map(
            gather,
            mesh=mesh,
            in_specs=tuple(landing.sharding.spec for landing in inputs),
            out_specs=tuple(sharding.spec for sharding in out),
            check_vma=False,
        )
        return Program("gather", function, inputs, out)


def _cut(*shards: jax.Array, boxes: tuple[tuple[int, wire.Box], ...]) -> tuple[jax.Array, ...]:
    """The boxes (input, box) of one device's shards."""
    return tuple(lax.slice(shards[index], *zip(*box, strict=True)) for index, box in boxes)


def _join(
    *pieces: jax.Array, parts: tuple[tuple[tuple[int, ...], np.dtype, tuple[wire.Box, ...]], ...]
) -> tuple[jax.Array, ...]:
    """The landings (shape, dtype, box of each piece) of one device; rows that nothing lands on are zeros."""
    queue = list(pieces)
    out = []
    for shape, dtype, boxes in parts:
        placed = [(box, queue.pop(0)) for box in boxes]
        joined = _concatenate(placed) if placed else jnp.zeros([0] * len(shape), dtype)
        padding = [(0, size - have, 0) for size, have in zip(shape, joined.shape, strict=True)]
        out.append(lax.pad(joined, np.zeros((), dtype), padding))
    return tuple(out)


def _concatenate(placed: list[tuple[wire.Box, jax.Array]]) -> jax.Array:
    """One array of pieces that tile a box: concatenated along a dim that some edge cuts through entirely."""
    if len(placed) == 1:
        return placed[0][1]
    for dim in range(placed[0][1].ndim):
        edges = [
            edge
            for edge in sorted({box[dim][0] for box, _ in placed})
            if not any(box[dim][0] < edge < box[dim][1] for box, _ in placed)
        ]
        if len(edges) > 1:
            slabs: dict[int, list[tuple[wire.Box, jax.Array]]] = {edge: [] for edge in edges}
            for box, piece in placed:
                slabs[max(edge for edge in edges if edge <= box[dim][0])].append((box, piece))
            return lax.concatenate([_concatenate(slab) for slab in slabs.values()], dim)
    raise AssertionError("pieces of a grid of blocks always share an edge that cuts through")


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _free_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes over which `sharding` replicates, in the mesh's order: the rank of a replica counts along them."""
    used = {name for entry in sharding.spec for name in _names(entry)}
    return tuple(name for name, size in sharding.mesh.shape.items() if name not in used and size > 1)


def _landing(leaf: Leaf, crossing: wire.Wire) -> jax.ShapeDtypeStruct:
    """What the pieces become on the destination: the array itself, or with `crossing.dim` shared by the replicas."""
    dim = crossing.dim
    if dim is None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.destination)
    entries = [*leaf.destination.spec, *[None] * (len(leaf.shape) - len(leaf.destination.spec))]
    entries[dim] = (*_names(entries[dim]), *_free_axes(leaf.destination))
    mesh = leaf.destination.mesh
    rows = crossing.rows * math.prod(mesh.shape[name] for name in entries[dim])
    shape = (*leaf.shape[:dim], rows, *leaf.shape[dim + 1 :])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*entries)))
