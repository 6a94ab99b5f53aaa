"""Cross-entropy and accuracy of a vocabulary that is cut over tp, without ever holding the logits of all tokens.

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

    per_token = _by_chunks(jax.checkpoint(entropies, prevent_cse=False), x, head, targets, chunk)
    return (per_token * weights.astype(per_token.dtype)).sum()


def token_correct(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, axes: Axes, chunk: int = CHUNK
) -> jax.Array:
    """1.0 where the likeliest id of the whole vocabulary is the target and the weight is positive, [b, s].

    Of equally likely ids the lowest counts.
    """

    def likeliest(head: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = dot(x, head, dtype=wide(x.dtype))
        top = axes.tp.pmax(logits.max(-1))
        mine = jnp.argmax(logits, -1).astype(jnp.int32) + axes.tp.index() * logits.shape[1]
        lowest = -axes.tp.pmax(jnp.where(logits.max(-1) == top, -mine, jnp.iinfo(jnp.int32).min))
        return (lowest == targets).astype(logits.dtype)

    correct = _by_chunks(likeliest, x, head, targets, chunk)
    return jnp.where(weights > 0, correct, 0)


def _by_chunks(
    function: Callable[..., jax.Array], x: jax.Array, head: jax.Array, targets: jax.Array, chunk: int
) -> jax.Array:
    """`function(head, x, targets)` of all tokens [b, s], `chunk` of them at a time."""
    b, s, d = x.shape
    chunk = min(chunk, b * s)
    padding = -(b * s) % chunk
    x = vary_like(x, head)  # out here: the gradient is summed over tp once, not for every chunk
    x = jnp.pad(x.reshape(b * s, d), ((0, padding), (0, 0))).reshape(-1, chunk, d)
    targets = jnp.pad(targets.reshape(b * s), (0, padding)).reshape(-1, chunk)
    values = lax.map(lambda pair: function(head, *pair), (x, targets))
    return values.reshape(-1)[: b * s].reshape(b, s)
