"""Which part of a run is this process's. Every process walks the same tasks in the same order, and compiles, holds and
dispatches what stands on its own devices: with one process, all of it.

An array whose devices are all another process's has a name here, but no shards (`elsewhere`). Arrays travel between
processes one device at a time, by `send`, which both ends call, each in the order of the same list.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding


def is_mine(device: jax.Device) -> bool:
    """Whether this process drives the device."""
    return device.process_index == jax.process_index()


def owns_some(devices: Iterable[jax.Device]) -> bool:
    """Whether this process drives any of them."""
    return any(map(is_mine, devices))


def firsts(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """The first device of each process that drives some of them."""
    found: dict[int, jax.Device] = {}
    for device in devices:
        found.setdefault(device.process_index, device)
    return list(found.values())


def elsewhere(struct: jax.ShapeDtypeStruct) -> jax.Array:
    """An array like `struct` of which this process has no shard."""
    return jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, [], dtype=struct.dtype)


def send(array: jax.Array | None, like: jax.ShapeDtypeStruct, source: jax.Device, to: jax.Device) -> jax.Array | None:
    """`array`, which lies on the device `source`, on the device `to`; None in a process that drives neither.

    `like` tells shape and type where `array` is another process's and so None."""
    if not owns_some((source, to)):
        return None
    if not is_mine(source):
        array = elsewhere(jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=SingleDeviceSharding(source)))
    return jax.device_put(array, SingleDeviceSharding(to))


def replicated(value: Any, sharding: NamedSharding) -> jax.Array:
    """`value`, which every process of the mesh has, on each of its devices."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
