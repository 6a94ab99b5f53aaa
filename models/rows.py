"""What enters a language model: rows of its embedding, and rows of encoders where the text has their places."""

import jax
import jax.numpy as jnp

from models.axes import Axes, vary_like
from models.layers import own
from models.weight import Weight


def lookup(table: jax.Array | Weight, tokens: jax.Array, vocab: int, axes: Axes) -> jax.Array:
    """Rows of `table`, cut over tp, as the stream has them; an id that is none of the `vocab` yields zeros."""
    rows, tap = (table.value, table.tap) if isinstance(table, Weight) else (table, None)
    local = tokens - axes.tp.index() * rows.shape[0]
    mine = (local >= 0) & (local < rows.shape[0]) & (tokens < vocab)
    at, rows = jnp.where(mine, local, 0), vary_like(rows, local)
    found = _take(rows, at) if tap is None else _take_tapped(rows, vary_like(tap, local), at)
    return axes.total(jnp.where(mine[..., None], found, 0))


def _take(table: jax.Array, at: jax.Array) -> jax.Array:
    return table.at[at].get(mode="promise_in_bounds")


@jax.custom_vjp
def _take_tapped(table: jax.Array, tap: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of `table`. Their gradients are added to `tap`: an accumulator in its place needs no array of its size."""
    return _take(table, at)


_take_tapped.defvjp(
    lambda table, tap, at: (_take(table, at), (tap, at)),
    lambda kept, g: (None, kept[0].at[kept[1]].add(g.astype(kept[0].dtype), mode="promise_in_bounds"), None),
)


def merge(x: jax.Array, rows: jax.Array, index: jax.Array, axes: Axes) -> jax.Array:
    """`x` [b, s, d] of the stream with an encoder's row wherever `index` [b, s], of all devices of tp, is not -1.

    `rows` [items, rows per item, d] are those of this data replica, `index` counts over all replicas. An index that
    points at another replica's rows yields NaN, which stops the run; wrong rows would train in silence.
    """
    found, here = _at_places(rows.astype(x.dtype), index, axes)
    return jnp.where(here, found, x)


def add_rows(x: jax.Array, rows: jax.Array, index: jax.Array, axes: Axes) -> jax.Array:
    """`merge` that adds an encoder's row to what is there."""
    found, here = _at_places(rows.astype(x.dtype), index, axes)
    return x + jnp.where(here, found, 0)


def _at_places(rows: jax.Array, index: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """(rows where `index` points, [b, s, d] of the stream; whether it points anywhere)."""
    index = own(index, 1, axes.sp)
    flat = rows.reshape(-1, rows.shape[-1])
    local = jnp.where(index >= 0, index - axes.dp.index() * flat.shape[0], 0)
    found = vary_like(flat, local).at[local].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return found, (index >= 0)[..., None]
