"""Digests of arrays that do not depend on how they are cut: what a save writes beside them, a restore compares.

Orbax stores values without a checksum (0.12): a byte that a disk changes would come back as another weight. A digest is
the sum over all elements of (bits of the element) x (an odd number that its place gives), modulo 2^32, which shards add
up to in any order. A change of one element always shows, since an odd factor has an inverse; others by 2^-32 do not.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.alive import on_device


def of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Name -> digest; waits for the devices. Of arrays on the devices of several processes all of them take part."""
    jax.block_until_ready(list(arrays.values()))  # CPUs: no collective beside another
    found = {name: _program(_mesh(array))(on_device(array)) for name, array in arrays.items()}
    return {name: int(digest.addressable_data(0)) for name, digest in found.items()}


def _mesh(array: jax.Array) -> NamedSharding:
    assert isinstance(array.sharding, NamedSharding)
    return NamedSharding(array.sharding.mesh, P())


@functools.cache
def _program(everywhere: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_digest, out_shardings=everywhere)


def _digest(array: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(4, array.dtype.itemsize)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim in range(bits.ndim):
        stride = math.prod(bits.shape[dim + 1 :]) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride)
    return (bits * (place * jnp.uint32(0x9E3779B2) + jnp.uint32(1))).sum(dtype=jnp.uint32)
