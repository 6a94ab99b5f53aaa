"""Cross-entropy and likeliest ids of a vocabulary that is cut over tp, without ever holding the logits of all tokens.

Tokens pass in chunks; the backward pass computes a chunk's logits again. What exists at a time is [chunk, v / tp].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import Axes, vary_like
from models.layers import dot, wide

CHUNK = 1024  # tokens


def token_sum(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, axes: Axes, chunk: int = CHUNK
) -> jax.Array:
    """This device's tokens' cross-entropies, summed with `weights` [b, s]; the same over tp.

    `x` [b, s, d] and the local `head` [d, v / tp] give the logits, in at least float32.
    """

    def entropies(head: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = dot(x, head, dtype=wide(x.dtype))
        top = axes.tp.pmax(lax.stop_gradient(logits).max(-1))
        total = jnp.log(axes.tp.psum(jnp.exp(logits - top[:, None]).sum(-1))) + top
        local = targets - axes.tp.index() * logits.shape[1]
        mine = (local >= 0) & (local < logits.shape[1])
        chosen = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], 1, mode="promise_in_bounds")[:, 0]
        return total - axes.tp.psum(jnp.where(mine, chosen, 0))

    per_token = _by_chunks(jax.checkpoint(entropies, prevent_cse=False), head, chunk, x, targets)
    return (per_token * weights.astype(per_token.dtype)).sum()


def token_likeliest(x: jax.Array, head: jax.Array, *, axes: Axes, chunk: int = CHUNK) -> jax.Array:
    """The likeliest next id of the whole vocabulary at every position, int32 [b, s]."""

    def ids(head: jax.Array, x: jax.Array) -> jax.Array:
        return likeliest(dot(x, head, dtype=wide(x.dtype)), axes)

    return _by_chunks(ids, head, chunk, x)


def likeliest(logits: jax.Array, axes: Axes) -> jax.Array:
    """The id of the largest logit, int32 [n], of `logits` [n, v / tp]; of equal ones the lowest id.

    Where logits are NaN it is some id of the vocabulary."""
    top = axes.tp.pmax(logits.max(-1))
    mine = jnp.argmax(logits, -1).astype(jnp.int32) + axes.tp.index() * logits.shape[1]
    return -axes.tp.pmax(jnp.where(~(logits.max(-1) < top), -mine, jnp.iinfo(jnp.int32).min))


def _by_chunks(
    function: Callable[..., jax.Array], head: jax.Array, chunk: int, x: jax.Array, *more: jax.Array
) -> jax.Array:
    """`function(head, x, *more)` of all tokens [b, s], `chunk` of them at a time."""
    b, s, _ = x.shape
    chunk = min(chunk, b * s)
    padding = -(b * s) % chunk
    x = vary_like(x, head)  # out here: the gradient is summed over tp once, not for every chunk

    def cut(a: jax.Array) -> jax.Array:
        flat = a.reshape(b * s, *a.shape[2:])
        return jnp.pad(flat, ((0, padding), *[(0, 0)] * (flat.ndim - 1))).reshape(-1, chunk, *a.shape[2:])

    values = lax.map(lambda inputs: function(head, *inputs), tuple(map(cut, (x, *more))))
    return values.reshape(-1)[: b * s].reshape(b, s)
