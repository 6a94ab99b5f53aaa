"""Gradient accumulators: each data replica adds its microbatches' gradients in place; the step's end sums and measures.

Inside of the per-device programs an accumulator has a leading dim of 1, which is this replica's part of a dim over
the replicas. Nothing empties one: the first microbatch of a step writes where the others add.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hetjax.core.mesh import Spread
from models.axes import varying_axes
from models.layers import wide

Tree = Any


def cleared(acc: jax.Array, first: jax.Array) -> jax.Array:
    """`acc`, or zeros if `first`: to add to it in several steps."""
    return jnp.where(first, 0, acc)


def add(acc: Tree, new: Tree, first: jax.Array | bool) -> Tree:
    """`acc` with `new` added, or in its place if `first`."""
    return {**acc, **jax.tree.map(lambda a, g: _sum(a, g[None], first), {name: acc[name] for name in new}, new)}


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
    new = new[None, None]
    at = (jnp.int32(0), row, *[jnp.int32(0)] * (new.ndim - 2))
    return lax.dynamic_update_slice(acc, _sum(lax.dynamic_slice(acc, at, new.shape), new, first), at)


def _sum(old: jax.Array, new: jax.Array, first: jax.Array | bool) -> jax.Array:
    # Not `old * (not first)`: what a step before left there may be NaN.
    return jnp.where(first, new, old + new)


def reduce(acc: Tree, spreads: Tree) -> Tree:
    """The sums over the replicas of each leaf, cut over them as its `Spread` says."""

    def reduce_leaf(leaf: jax.Array, spread: Spread) -> jax.Array:
        if spread.dim is None:
            return lax.psum(leaf[0], spread.replicas)
        return lax.psum_scatter(leaf[0], spread.replicas, scatter_dimension=spread.dim, tiled=True)

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
