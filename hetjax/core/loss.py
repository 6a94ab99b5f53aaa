"""Cross-entropy and likeliest ids of a vocabulary that is cut over tp, without ever holding the logits of all tokens.

Tokens pass in chunks; the backward pass computes a chunk's logits again. What exists at a time is [chunk, v / tp].
"""

from collections.abc import Callable
from typing import Any

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

    def of_chunk(head: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
        return _entropies(_logits(x, head), targets, axes)

    return _weighted(_by_chunks(jax.checkpoint(of_chunk, prevent_cse=False), head, chunk, x, targets), weights)


def token_scores(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, axes: Axes, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """(`token_sum`, the likeliest next id of the whole vocabulary at every position, int32 [b, s])."""

    def of_chunk(head: jax.Array, x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(x, head)
        return _entropies(logits, targets, axes), likeliest(logits, axes)

    entropies, ids = _by_chunks(of_chunk, head, chunk, x, targets)
    return _weighted(entropies, weights), ids


def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    return dot(x, head, dtype=wide(x.dtype))


def _entropies(logits: jax.Array, targets: jax.Array, axes: Axes) -> jax.Array:
    """The cross-entropy [n] of each token, of this device's `logits` [n, v / tp]."""
    top = axes.tp.pmax(lax.stop_gradient(logits).max(-1))
    total = jnp.log(axes.tp.psum(jnp.exp(logits - top[:, None]).sum(-1))) + top
    local = targets - axes.tp.index() * logits.shape[1]
    mine = (local >= 0) & (local < logits.shape[1])
    chosen = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], 1, mode="promise_in_bounds")[:, 0]
    return total - axes.tp.psum(jnp.where(mine, chosen, 0))


def _weighted(per_token: jax.Array, weights: jax.Array) -> jax.Array:
    return (per_token * weights.astype(per_token.dtype)).sum()


def likeliest(logits: jax.Array, axes: Axes) -> jax.Array:
    """The id of the largest logit, int32 [n], of `logits` [n, v / tp]; of equal ones the lowest id.

    Where logits are NaN it is some id of the vocabulary."""
    top = axes.tp.pmax(logits.max(-1))
    mine = jnp.argmax(logits, -1).astype(jnp.int32) + axes.tp.index() * logits.shape[1]
    return -axes.tp.pmax(jnp.where(~(logits.max(-1) < top), -mine, jnp.iinfo(jnp.int32).min))


def _by_chunks(function: Callable[..., Any], head: jax.Array, chunk: int, x: jax.Array, *more: jax.Array) -> Any:
    """`function(head, x, *more)` of all tokens, `chunk` of them at a time: each of its arrays [n] as [b, s]."""
    b, s, _ = x.shape
    chunk = min(chunk, b * s)
    padding = -(b * s) % chunk
    x = vary_like(x, head)  # out here: the gradient is summed over tp once, not for every chunk

    def cut(a: jax.Array) -> jax.Array:
        flat = a.reshape(b * s, *a.shape[2:])
        return jnp.pad(flat, ((0, padding), *[(0, 0)] * (flat.ndim - 1))).reshape(-1, chunk, *a.shape[2:])

    values = lax.map(lambda inputs: function(head, *inputs), tuple(map(cut, (x, *more))))
    return jax.tree.map(lambda value: value.reshape(-1)[: b * s].reshape(b, s), values)
