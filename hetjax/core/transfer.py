"""Compiled programs that carry arrays between two meshes in pieces, without touching the host.

`wire.py` says which pieces cross; this file runs them: static slices on each source device, a put of
each piece, a join on each destination device, and one all-gather inside the destination mesh where it wants replicas.

`jax.device_put` is direct and asynchronous for single-device pieces; between most shardings it pulls the array through
numpy and blocks the host until the producer is done. Programs are per device, since the pieces of two devices differ.

With several processes each cuts, joins and gathers on its own devices, and puts the pieces that leave or reach these.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from hetjax.core import processes, wire
from hetjax.core.route import Leaf, Program, Route, free_axes, landing
from hetjax.core.sends import Send, Sends


@dataclasses.dataclass(frozen=True)
class Step:
    """One single-device program of the pieces route; inputs and outputs are places in the list of a call's values."""

    program: Program
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    device: jax.Device

    def run(self, values: list[Any]) -> None:
        """Fills the places of its outputs."""
        for place, value in zip(self.outputs, self.program.compile()(*[values[n] for n in self.inputs]), strict=True):
            values[place] = value


class Pieces:
    """Builds the route between any two shardings.

    Every single-device array of a call gets a place in one list, fixed here: the source's shards, what the cuts return,
    what was put, what the joins return. A call does no more than fill that list, wrap its end and gather.
    """

    def __init__(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves = leaves
        self.wires = [wire.plan(leaf.held, leaf.wanted) for leaf in leaves]
        self.landings = [landing(leaf, crossing) for leaf, crossing in zip(leaves, self.wires, strict=True)]
        meshes = (leaves[0].source.mesh, leaves[0].destination.mesh)
        self.devices = {device.id: device for mesh in meshes for device in mesh.devices.flat}
        self.size = 0
        self.taken: dict[tuple[int, int, wire.Box], int] = {}  # (leaf, sender, box in its block) -> place
        self.got: dict[tuple[int, int], list[tuple[wire.Box, int]]] = {}  # (leaf, receiver) -> (box in landing, place)
        self.landed: dict[tuple[int, int], int] = {}  # (leaf, receiver) -> place
        for index, leaf in enumerate(leaves):
            for device in leaf.held:
                self.taken[index, device, self._whole(index, device)] = self._next()

    def route(self) -> Route:
        """The finished route."""
        held = [place for device, place in self._held() if processes.is_mine(self.devices[device])]
        cuts, sends, joins = self._mine(self._cuts()), Sends(self._sends()), self._mine(self._joins())
        wraps = [
            (struct, [self.landed[index, device] for device in leaf.wanted if processes.is_mine(self.devices[device])])
            for index, (leaf, struct) in enumerate(zip(self.leaves, self.landings, strict=True))
        ]
        arrives = processes.owns_some(self.leaves[0].destination.mesh.devices.flat)
        shared = {index: crossing.dim for index, crossing in enumerate(self.wires) if crossing.dim is not None}
        gather = self._gather(shared) if shared and arrives else None
        empty, absent = (
            [None] * self.size,
            [] if arrives else [processes.elsewhere(leaf.landed) for leaf in self.leaves],
        )

        def run(arrays: list[jax.Array]) -> list[jax.Array]:
            values: list[Any] = empty.copy()
            for place, shard in zip(held, (s for array in arrays for s in array.addressable_shards), strict=True):
                values[place] = shard.data
            for step in cuts:
                step.run(values)
            sends.run(values)
            if not arrives:
                return absent
            for step in joins:
                step.run(values)
            out: list[jax.Array] = [
                jax.make_array_from_single_device_arrays(
                    struct.shape, struct.sharding, [values[place] for place in places], dtype=struct.dtype
                )
                for struct, places in wraps
            ]
            if gather:
                for index, array in zip(shared, gather.compile()(*[out[index] for index in shared]), strict=True):
                    out[index] = array
            return out

        programs = (*(step.program for step in (*cuts, *joins)), *([gather] if gather else []))
        moved = (crossing.moved * leaf.dtype.itemsize for crossing, leaf in zip(self.wires, self.leaves, strict=True))
        return Route(run, programs, sum(moved), crosses=bool(sends.crossing))

    def _mine(self, steps: Sequence[Step]) -> list[Step]:
        return [step for step in steps if processes.is_mine(step.device)]

    def _held(self) -> list[tuple[int, int]]:
        """(device, place) of the source's shards, leaf by leaf."""
        return [
            (device, self.taken[index, device, self._whole(index, device)])
            for index, leaf in enumerate(self.leaves)
            for device in leaf.held
        ]

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
        structs = tuple(self._struct(index, box, self.devices[device]) for index, box in inputs)
        return Program(f"{name} on {device}", function, structs, SingleDeviceSharding(self.devices[device]))

    def _cuts(self) -> list[Step]:
        """One program per source device with all of its slices; a piece that is a whole shard needs none, but a copy
        where another process fetches it, for which this one's runtime keeps nothing alive that is donated."""
        slices: dict[int, dict[tuple[int, wire.Box], None]] = {}  # the inner dict is an ordered set
        for index, crossing in enumerate(self.wires):
            for piece in crossing.pieces:
                source, to = self._ends(piece)
                fetched = self.leaves[index].donated and source.process_index != to.process_index
                if fetched or (index, piece.sender, piece.take) not in self.taken:
                    slices.setdefault(piece.sender, {})[index, piece.take] = None
        steps = []
        for device, boxes in slices.items():
            needed = sorted({index for index, _ in boxes})
            shards = [(index, self._whole(index, device)) for index in needed]
            function = functools.partial(_cut, boxes=tuple((needed.index(index), box) for index, box in boxes))
            places = tuple(self.taken[index, device, box] for index, box in shards)
            outputs = tuple(self._next() for _ in boxes)
            self.taken |= {(index, device, box): n for (index, box), n in zip(boxes, outputs, strict=True)}
            program = self._program("cut", function, shards, device)
            steps.append(Step(program, places, outputs, self.devices[device]))
        return steps

    def _sends(self) -> list[Send]:
        """Every piece that leaves its device."""
        sends = []
        for index, crossing in enumerate(self.wires):
            for piece in crossing.pieces:
                place = self.taken[index, piece.sender, piece.take]
                if piece.sender != piece.receiver:
                    source, to, origin, place = *self._ends(piece), place, self._next()
                    sends.append(Send(self._struct(index, piece.take, source), source, to, origin, place))
                self.got.setdefault((index, piece.receiver), []).append((piece.place, place))
        return sends

    def _ends(self, piece: wire.Piece) -> tuple[jax.Device, jax.Device]:
        return self.devices[piece.sender], self.devices[piece.receiver]

    def _struct(self, index: int, box: wire.Box, device: jax.Device) -> jax.ShapeDtypeStruct:
        """An array on one device that has the size of a box of a leaf."""
        shape = [stop - start for start, stop in box]
        return jax.ShapeDtypeStruct(shape, self.leaves[index].dtype, sharding=SingleDeviceSharding(device))

    def _joins(self) -> list[Step]:
        """One program per destination device that makes its landings; a landing that is one piece needs none."""
        steps = []
        for device in self.leaves[0].wanted:
            parts: list[tuple[tuple[int, ...], np.dtype, tuple[wire.Box, ...]]] = []
            inputs: list[tuple[int, wire.Box]] = []
            places: list[int] = []
            outputs: list[int] = []
            for index, (leaf, struct) in enumerate(zip(self.leaves, self.landings, strict=True)):
                shape = struct.sharding.shard_shape(struct.shape)
                got = self.got.get((index, device), [])
                if [box for box, _ in got] == [tuple((0, size) for size in shape)]:
                    self.landed[index, device] = got[0][1]
                    continue
                parts.append((shape, leaf.dtype, tuple(box for box, _ in got)))
                inputs += [(index, box) for box, _ in got]
                places += [place for _, place in got]
                outputs.append(self._next())
                self.landed[index, device] = outputs[-1]
            if parts:
                function = functools.partial(_join, parts=tuple(parts))
                program = self._program("join", function, inputs, device)
                steps.append(Step(program, tuple(places), tuple(outputs), self.devices[device]))
        return steps

    def _gather(self, shared: Mapping[int, int]) -> Program:
        """One program on the destination mesh that completes the blocks whose replicas received parts of them.

        `shared`: leaf -> the dim along which they did."""
        inputs = tuple(self.landings[index] for index in shared)
        out = tuple(self.leaves[index].destination for index in shared)
        sizes = [self.leaves[i].destination.shard_shape(self.leaves[i].shape)[dim] for i, dim in shared.items()]
        axes = [free_axes(sharding) for sharding in out]

        def gather(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            whole = [
                lax.all_gather(array, names, axis=dim, tiled=True)
                for array, names, dim in zip(arrays, axes, shared.values(), strict=True)
            ]
            return tuple(
                lax.slice_in_dim(array, 0, size, axis=dim)
                for array, size, dim in zip(whole, sizes, shared.values(), strict=True)
            )

        # The result is the same on all replicas, which shard_map cannot see from an all_gather: no check.
        function = jax.shard_map(
            gather,
            mesh=self.leaves[0].destination.mesh,
            in_specs=tuple(struct.sharding.spec for struct in inputs),
            out_specs=tuple(sharding.spec for sharding in out),
            check_vma=False,
        )
        return Program("gather", function, inputs, out)


def _cut(*shards: jax.Array, boxes: tuple[tuple[int, wire.Box], ...]) -> tuple[jax.Array, ...]:
    """The boxes (input, box) of one device's shards; copies, also of a whole one."""
    return tuple(jnp.copy(lax.slice(shards[index], *zip(*box, strict=True))) for index, box in boxes)


def _join(
    *pieces: jax.Array, parts: tuple[tuple[tuple[int, ...], np.dtype, tuple[wire.Box, ...]], ...]
) -> tuple[jax.Array, ...]:
    """The landings (shape, dtype, box of each piece) of one device; rows that nothing lands on are zeros."""
    queue = iter(pieces)
    out = []
    for shape, dtype, boxes in parts:
        landing = jnp.zeros(shape, dtype)
        for box in boxes:
            landing = lax.dynamic_update_slice(landing, next(queue), [start for start, _ in box])
        out.append(landing)
    return tuple(out)
