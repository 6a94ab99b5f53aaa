"""Which part of a run is this process's. Every process walks the same tasks in the same order, and compiles, holds and
dispatches what stands on its own devices: with one process, all of it.

An array whose devices are all another process's has a name here, but no shards (`elsewhere`). Arrays travel between
processes one device at a time. jax numbers such transfers by a counter that each process has for itself, so every
process takes part in each of them, in the same order, also where neither end is its own (jax 0.10.2 and 0.12: between
three processes one would else wait for ever); that costs such a bystander 0.03 ms.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def is_mine(device: jax.Device) -> bool:
    """Whether this process drives the device."""
    return device.process_index == jax.process_index()


def owns_some(devices: Iterable[jax.Device]) -> bool:
    """Whether this process drives any of them."""
    return any(map(is_mine, devices))


def own(devices: Sequence[jax.Device]) -> frozenset[int]:
    """The numbers of those that this process drives."""
    return frozenset(number for number, device in enumerate(devices) if is_mine(device))


def firsts(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """The first device of each process that drives some of them."""
    found: dict[int, jax.Device] = {}
    for device in devices:
        found.setdefault(device.process_index, device)
    return list(found.values())


def places_here(shape: tuple[int, ...], sharding: NamedSharding) -> list[tuple[slice, ...]]:
    """Which parts of an array lie on this process's devices."""
    return [place for device, place in sharding.devices_indices_map(shape).items() if is_mine(device)]


def elsewhere(struct: jax.ShapeDtypeStruct) -> jax.Array:
    """An array like `struct` of which this process has no shard."""
    return jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, [], dtype=struct.dtype)


def placed(value: Any, sharding: NamedSharding) -> jax.Array:
    """`value`, which every process of the mesh has, on its devices."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
