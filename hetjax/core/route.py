"""What a transfer between two meshes is made of: arrays with both their shardings, compiled programs, a way through."""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hetjax.core import wire
from hetjax.core.mesh import axis_names


def blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[int, wire.Box]:
    """The block of each device of `sharding`, by device id, in the mesh's order."""
    indices = sharding.devices_indices_map(shape)
    return {
        device.id: tuple(part.indices(size)[:2] for part, size in zip(indices[device], shape, strict=True))
        for device in sharding.mesh.devices.flat
    }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an edge: its type and both of its shardings. All leaves of an edge share their two meshes.

    `donated`: its owner may donate it before it has arrived."""

    shape: tuple[int, ...]
    dtype: np.dtype
    source: NamedSharding
    destination: NamedSharding
    donated: bool = False

    @property
    def landed(self) -> jax.ShapeDtypeStruct:
        """What arrives on the destination."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.destination)

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
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def compile(self) -> jax.stages.Compiled:
        """The executable; the first call compiles it, later calls from any thread return the same one."""
        if self.compiled is None:
            with self.lock:
                if self.compiled is None:  # another thread may have been first
                    lowered = jax.jit(self.function, out_shardings=self.out_shardings).lower(*self.inputs)
                    self.compiled = lowered.compile()
        return self.compiled


@dataclasses.dataclass(frozen=True)
class Route:
    """One direction of an edge: `run` takes and returns its arrays in the order of the leaves."""

    run: Callable[[list[jax.Array]], list[jax.Array]]
    programs: tuple[Program, ...]
    wire_bytes: int
    crosses: bool = False  # between processes: each of them takes part


def landing(leaf: Leaf, crossing: wire.Wire) -> jax.ShapeDtypeStruct:
    """What the pieces become on the destination: the array itself, or with `crossing.dim` shared by the replicas."""
    dim, mesh = crossing.dim, leaf.destination.mesh
    if dim is None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.destination)
    entries = [*leaf.destination.spec, *[None] * (len(leaf.shape) - len(leaf.destination.spec))]
    entries[dim] = (*axis_names(entries[dim]), *free_axes(leaf.destination))
    rows = crossing.rows * math.prod(mesh.shape[name] for name in entries[dim])
    shape = (*leaf.shape[:dim], rows, *leaf.shape[dim + 1 :])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*entries)))


def free_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes over which `sharding` replicates, in the mesh's order: the rank of a replica counts along them."""
    used = {name for entry in sharding.spec for name in axis_names(entry)}
    return tuple(name for name, size in sharding.mesh.shape.items() if name not in used and size > 1)
