"""Gradient accumulators: each data replica adds its microbatches' gradients in place; the step's end sums and measures.

Where several replicas have their own, an accumulator has a leading dim over them: in the per-device programs one of 1,
this replica's part. It enters a program, is added to and leaves in one shape, or XLA would copy it first. Nothing
empties one: the first microbatch of a step writes where the others add. Under ZeRO-2 and 3 replicas share an
accumulator that lies in shards, and what is added to it has been scattered.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hetjax.core.mesh import Spread
from models.axes import vary_like, varying_axes
from models.layers import wide
from models.paths import Path, at, flat, nested
from models.weight import split

Tree = Any


def opened(acc: jax.Array, spread: Spread, like: jax.Array, first: jax.Array) -> jax.Array:
    """What a leaf's gradient may be added to in several steps, an array `like` the leaf: its accumulator itself, or
    where that lies in shards, zeros."""
    return (
        vary_like(jnp.zeros(like.shape, acc.dtype), like)
        if spread.early
        else jnp.where(first, 0, acc).reshape(like.shape)
    )


def closed(acc: jax.Array, spread: Spread, found: jax.Array, first: jax.Array) -> jax.Array:
    """The accumulator, from what the gradient has been added to."""
    return add({"": acc}, {"": found}, {"": spread}, first)[""] if spread.early else found.reshape(acc.shape)


def add(acc: Tree, new: Tree, spreads: Tree, first: jax.Array | bool) -> Tree:
    """`acc` with the gradients `new` of some of its leaves added, or in their place if `first`."""
    new = scatter(new, spreads)
    return {
        **acc,
        **jax.tree.map(lambda a, g: _sum(a, g.reshape(a.shape), first), {name: acc[name] for name in new}, new),
    }


def add_layer(acc: Mapping, rows: Mapping, i: jax.Array | int, new: Mapping, first: jax.Array) -> dict[str, Any]:
    """Stacked accumulators with the gradients of one layer added, that of repetition `i` (see `stacks.take`)."""
    changed = {
        name: add_layer(acc[name], row, i, new[name], first)
        if isinstance(row, Mapping)
        else _add_row(acc[name], row.at(i), new[name], first)
        for name, row in rows.items()
    }
    return {**acc, **changed}


def _add_row(acc: jax.Array, row: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    replicas, zero = acc.ndim - new.ndim - 1, jnp.int32(0)
    at = (*[zero] * replicas, row, *[zero] * new.ndim)
    new = new.reshape(*[1] * (replicas + 1), *new.shape)
    return lax.dynamic_update_slice(acc, _sum(lax.dynamic_slice(acc, at, new.shape), new, first), at)


def _sum(old: jax.Array, new: jax.Array, first: jax.Array | bool) -> jax.Array:
    # Not `old * (not first)`: what a step before left there may be NaN.
    return jnp.where(first, new, old + new)


def scatter(new: Tree, spreads: Tree, *, stacked: bool = False) -> Tree:
    """A microbatch's gradients (of one layer, if `stacked`), as their accumulators take them: those that are
    accumulated in shards summed over the replicas that share them, of which each gets its part.

    One reduce-scatter for all that go over the same replicas: gradients of a layer are ready together, and many small
    ones would each wait for the network.
    """
    leaves = flat(new)
    together: dict[Any, list[Path]] = {}
    for path, leaf in leaves.items():
        spread = at(spreads, path)
        if spread.early:
            together.setdefault((spread.inside, varying_axes(leaf), leaf.dtype), []).append(path)
    for (inside, _, _), paths in together.items():
        dims = [at(spreads, path).dim - stacked for path in paths]
        mine = _scatter([leaves[path] for path in paths], dims, inside)
        leaves |= dict(zip(paths, mine, strict=True))
    return nested(leaves)


def _scatter(arrays: list[jax.Array], dims: list[int], axes: tuple[str, ...]) -> list[jax.Array]:
    """The sums of arrays over mesh axes, of each this device's part along its dim."""
    count = math.prod(map(lax.axis_size, axes))
    rows, shapes = [], []
    for array, dim in zip(arrays, dims, strict=True):
        shards = array.reshape(*array.shape[:dim], count, -1, *array.shape[dim + 1 :])
        rows.append(jnp.moveaxis(shards, dim, 0).reshape(count, -1))
        shapes.append((*shards.shape[:dim], *shards.shape[dim + 1 :]))
    mine = lax.psum_scatter(jnp.concatenate(rows, 1), axes, scatter_dimension=0)
    return [a.reshape(shape) for a, shape in zip(split(mine, [row.shape[1] for row in rows]), shapes, strict=True)]


def in_global_view(program: Callable[..., tuple]) -> Callable[..., tuple]:
    """`program(*given, acc, first)`, which gives accumulators first, where single numbers are accumulated too: in the
    program they have a dim, which differs between devices."""

    def whole(*args: Tree) -> tuple:
        *given, acc, first = args
        found, *others = program(*given, jax.tree.map(jnp.atleast_1d, acc), first)
        return jax.tree.map(lambda a, given: a.reshape(given.shape), found, acc), *others

    return whole


def reduce(acc: Tree, spreads: Tree) -> Tree:
    """The sums over the replicas of each leaf, cut over them as its `Spread` says."""

    def reduce_leaf(leaf: jax.Array, spread: Spread) -> jax.Array:
        total = leaf[0]
        if spread.inside and not spread.early:
            total = lax.psum_scatter(total, spread.inside, scatter_dimension=spread.dim, tiled=True)
        return lax.psum(total, spread.outside) if spread.outside else total

    return jax.tree.map(reduce_leaf, acc, spreads)


def squares(grads: Tree, dtype: Any) -> jax.Array:
    """Sum of squares of each leaf over all devices, in at least float32: [leaves] of `dtype`."""
    own = [jnp.sum(jnp.square(g.astype(wide(g.dtype)))).astype(dtype) for g in jax.tree.leaves(grads)]
    found = dict.fromkeys(range(len(own)), jnp.zeros((), dtype))
    for axes in dict.fromkeys(map(varying_axes, own)):  # leaves cut alike are summed in one go
        numbers = [n for n, x in enumerate(own) if varying_axes(x) == axes]
        together = jnp.stack([own[n] for n in numbers])
        found |= dict(zip(numbers, lax.psum(together, tuple(sorted(axes))) if axes else together, strict=True))
    return jnp.array(list(found.values()), dtype)
