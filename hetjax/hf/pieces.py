"""Stored arrays are read piece by piece: beside the array that is made, a process holds a few megabytes of it.

A tensor of a file has other dims than our array, and often another dtype. Made in one go, several copies of it would be
alive at once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.hf.pattern import Index
from hetjax.hf.source import Array, Sliceable

PIECE = 2**23  # bytes, about


class Cut(NamedTuple):
    """Ranges of `length` along `dim` that cover an array; the last two overlap where `length` does not divide it."""

    dim: int
    length: int
    starts: Sequence[int]


def cut(shape: Sequence[int], num_bytes: int) -> Cut:
    """Cuts the longest dim so that of `num_bytes` a piece has at most PIECE, or one element of that dim."""
    dim = max(range(len(shape)), key=lambda d: shape[d])
    size = shape[dim]
    length = max(1, size // math.ceil(num_bytes / PIECE))
    return Cut(dim, length, [*range(0, size - length, length), size - length])


def on_host(stored: Sliceable, kind: Array) -> np.ndarray:
    """The whole array, contiguous, in the dtype of `kind`."""
    whole = np.empty(kind.shape, kind.dtype)
    dim, length, starts = cut(kind.shape, whole.nbytes)
    for start in starts:
        piece = (*map(slice, kind.shape[:dim]), slice(start, start + length), *map(slice, kind.shape[dim + 1 :]))
        whole[piece] = stored[piece]
    return whole


class Padded:
    """A stored array of `shape` with zeros behind it, as far as anyone looks."""

    def __init__(self, stored: Sliceable, shape: Sequence[int]) -> None:
        self._stored, self._shape = stored, shape

    def __getitem__(self, index: Index) -> np.ndarray:
        inside = [slice(min(i.start, n), min(i.stop, n)) for i, n in zip(index, self._shape, strict=True)]
        if inside == [*index]:
            return self._stored[index]
        if any(i.start == i.stop for i in inside):  # files give no empty ranges
            return np.zeros([i.stop - i.start for i in index])
        behind = [(0, i.stop - j.stop) for i, j in zip(index, inside, strict=True)]
        return np.pad(self._stored[tuple(inside)], behind)


def put(stored: Sliceable, leaf: jax.Array, *row: int) -> jax.Array:
    """`leaf`, which is given up, with the values of `stored` in its row `row` (without one: in all of it)."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    shape = leaf.shape[len(row) :]
    dim, length, starts = cut(sharding.shard_shape(leaf.shape)[len(row) :], math.prod(shape) * leaf.dtype.itemsize)
    for start in starts:
        piece = _piece(stored, leaf, len(row), Cut(dim, length, [start]))
        at = row + tuple(start if d == dim else 0 for d in range(len(shape)))
        # waits: else the host's copies of several pieces would be alive at once
        leaf = jax.block_until_ready(_setter(sharding)(leaf, piece, at))
    return leaf


def _piece(stored: Sliceable, leaf: jax.Array, num_rows: int, where: Cut) -> jax.Array:
    """The same range of every shard, so that one program sets all of them."""
    dim, length, (start,) = where
    shape, shard = list(leaf.shape[num_rows:]), list(leaf.sharding.shard_shape(leaf.shape)[num_rows:])
    whole, shape[dim], shard[dim] = shard[dim], shape[dim] // shard[dim] * length, length

    @functools.cache  # replicas share what is read
    def read(*starts: int) -> np.ndarray:
        ranges = tuple(slice(first, first + size) for first, size in zip(starts, shard, strict=True))
        return np.ascontiguousarray(stored[ranges], leaf.dtype).reshape([1] * num_rows + shard)

    def values(index: Index | None) -> np.ndarray:
        starts = [i.start or 0 for i in (index or ())[num_rows:]]
        starts[dim] = starts[dim] // length * whole + start
        return read(*starts)

    return jax.make_array_from_callback((*[1] * num_rows, *shape), leaf.sharding, values)


@functools.cache
def _setter(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    """Sets in every shard of a leaf the range that begins at a place, the same in each, to that shard of a piece."""
    spec = sharding.spec
    local = jax.shard_map(
        lax.dynamic_update_slice, mesh=sharding.mesh, in_specs=(spec, spec, P()), out_specs=spec, check_vma=False
    )
    return jax.jit(local, donate_argnums=0)
