"""Arrays of single stages, for a moment on the devices of all processes, cut as finely as their shapes allow.

Orbax writes and reads arrays of which every process has a part (0.12 refuses others); a stage's arrays are those of the
processes that it stands on. So a checkpoint of several processes takes each array once through the mesh of all devices,
whatever the stage's layout: with N devices, each holds an N-th of the state while it is copied to its host.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.boundary import Boundary

Arrays = Mapping[str, jax.Array]


class Union:
    """Named arrays of one stage, and the same on all `devices`."""

    def __init__(self, arrays: Mapping[str, jax.ShapeDtypeStruct], devices: Sequence[jax.Device]) -> None:
        mesh = _mesh(tuple(devices))
        places = {name: _cut(a.shape, mesh) for name, a in arrays.items()}
        self.spread = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[n]) for n, a in arrays.items()}
        self._there = Boundary(arrays, places)
        self._back = Boundary(self.spread, {name: a.sharding for name, a in arrays.items()})

    def programs(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, thunk) of every program of a save; those of a restore compile when it is made."""
        return self._there.programs()

    def to_all(self, arrays: Arrays | None) -> Arrays:
        """The arrays on all devices, from those of the stage; None: they are other processes'."""
        return self._there.forward(arrays)

    def to_stage(self, arrays: Arrays) -> Arrays:
        """The arrays on the stage's devices; without shards here where those are other processes'."""
        return self._back.forward(arrays)


@functools.cache
def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    """All devices, with an axis for each prime factor of their number."""
    sizes, rest = [], len(devices)
    for prime in range(2, rest + 1):
        while rest % prime == 0:
            sizes.append(prime)
            rest //= prime
    return Mesh(np.array(devices).reshape(sizes or [1]), [f"u{n}" for n in range(len(sizes) or 1)])


def _cut(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The dim that most devices can share, over as many as divide it."""
    axes: list[tuple[str, ...]] = [_dividing(size, mesh) for size in shape]
    ways = [math.prod(mesh.shape[name] for name in names) for names in axes]
    best = ways.index(max(ways)) if ways else 0
    return NamedSharding(mesh, P(*(names if dim == best and names else None for dim, names in enumerate(axes))))


def _dividing(size: int, mesh: Mesh) -> tuple[str, ...]:
    found: list[str] = []
    for name, ways in mesh.shape.items():
        if size % ways == 0:
            found.append(name)
            size //= ways
    return tuple(found)
