"""Cross-entropy of a vocabulary that is cut over tp, its gradients, and the likeliest ids.

Tokens pass in chunks: of logits, [chunk, v / tp] exist at a time. In training a chunk's logits are computed once, for
its part of the loss and of the gradients, and tokens without weight are left out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import Axes, sum_like, vary_like
from models.layers import dot, wide

# Tokens of a chunk. Each chunk reads and writes the head's accumulator; larger ones outgrow a CPU's caches: in float32
# 2,048 tokens took 202, 193, 210 and 238 ms in chunks of 256, 512, 1024 and 2048 with 4,096 ids and 512 features, and
# 1654, 1536, 1590 and 1587 ms with 24,576 ids and 576 features.
CHUNK = {"cpu": 512}
# Into about so many chunks, or more, a microbatch goes, since of the last one what has no weight is computed in vain:
# of 1,024 tokens of 4,096 ids and 512 features, with weight 768 of them, 4 took 76 ms and 2 took 95; with weight all,
# 98 and 92.
CHUNKS = {"cpu": 4}
LOGITS = 2 * 2**30  # bytes of a chunk's logits elsewhere: 16,384 tokens of 32,768 ids in float32


def chunk_size(platform: str, ids: int) -> int:
    """Tokens of a chunk where a device has `ids` of the vocabulary."""
    return CHUNK.get(platform, max(1, LOGITS // (4 * ids)))


def training_chunk(platform: str, chunk: int, tokens: int) -> int:
    """Tokens of a chunk in training, at most `chunk`, where a device has so many of a microbatch."""
    return min(chunk, -(-tokens // CHUNKS.get(platform, 1)))


class Head(NamedTuple):
    """The matrix that makes logits of features, as far as this device has it."""

    weight: jax.Array  # [d, v / tp] or [v / tp, d]
    vocab: int  # the dim of `weight` that is the vocabulary
    ids: int  # of the vocabulary; what is behind them on tp's devices is padding


class _Softmax(NamedTuple):
    powers: jax.Array  # [n, v / tp]
    total: jax.Array  # [n]: sum of the powers of the whole vocabulary
    hit: jax.Array  # [n, v / tp]: which id is the target
    entropy: jax.Array  # [n]: the cross-entropy


def add_gradients(
    x: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    acc: jax.Array | None,
    *,
    seed: jax.Array,
    axes: Axes,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(this device's tokens' cross-entropies, summed with `weights` [b, s]; the gradient of `x`; `acc` with that of
    the head added).

    `x` [b, s, d] gives logits in at least float32. The sum is the same over tp; gradients are those of `seed` times
    the sum. `acc` has the head's shape, and may be of another precision; None where the head is frozen.
    """
    head = head._replace(weight=head.weight.astype(x.dtype))
    flat = vary_like(x.reshape(-1, x.shape[-1]), head.weight)  # out here: its gradient is summed over tp only once
    tokens = flat, _known(targets, head.ids).reshape(-1), weights.reshape(-1).astype(wide(x.dtype))
    seed = seed.astype(wide(x.dtype))
    chunk = min(chunk, len(flat))
    order, steps = _weighted_first(tokens[-1], chunk)

    def add_chunk(i: jax.Array, sums: tuple) -> tuple:
        total, g_x, acc = sums
        at = lax.dynamic_slice(order, (i * chunk,), (chunk,))
        x, target, weight = (a.at[at].get(mode="fill", fill_value=0, unique_indices=True) for a in tokens)
        logits = masked(_product(x, head.weight, 1, 1 - head.vocab, weight.dtype), head.ids, axes)
        found = _softmax(logits, target, axes)
        g = ((found.powers / found.total[:, None] - found.hit) * (seed * weight)[:, None]).astype(x.dtype)
        g_rows = _product(g, head.weight, 1, head.vocab, g.dtype)
        if acc is not None:
            sides = (x, g) if head.vocab else (g, x)
            acc += _product(*sides, 0, 0, jnp.promote_types(g.dtype, acc.dtype)).astype(acc.dtype)
        total += (found.entropy * weight).sum()
        return total, g_x.at[at].set(g_rows, mode="drop", unique_indices=True), acc

    start = vary_like(jnp.zeros((), seed.dtype), weights), vary_like(jnp.zeros_like(flat), flat), acc
    total, g_x, acc = lax.fori_loop(0, steps, add_chunk, start)
    return total, sum_like(g_x, x).reshape(x.shape), acc


def _weighted_first(weights: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(the places of all tokens in an order in which those with weight come first, and behind them places that do not
    exist, to fill a chunk; how many chunks hold all that have weight), of `weights` [n]."""
    n = len(weights)
    order = jnp.argsort(weights == 0, stable=True).astype(jnp.int32)
    nowhere = vary_like(jnp.arange(n, n + -n % chunk, dtype=jnp.int32), order)
    return jnp.concatenate([order, nowhere]), (jnp.count_nonzero(weights).astype(jnp.int32) + chunk - 1) // chunk


def _product(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int, dtype: Any) -> jax.Array:
    return lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=dtype)


def masked(logits: jax.Array, ids: int, axes: Axes) -> jax.Array:
    """`logits` [n, v / tp], -inf behind the vocabulary's `ids`: their powers and their gradients are 0."""
    columns = logits.shape[1]
    if columns * axes.tp.size == ids:
        return logits
    return jnp.where(jnp.arange(columns, dtype=jnp.int32) + axes.tp.index() * columns < ids, logits, -jnp.inf)


def _known(targets: jax.Array, ids: int) -> jax.Array:
    """`targets`, with one that is no id of the vocabulary where no logit is."""
    return jnp.where(targets < ids, targets, -1)


def _softmax(logits: jax.Array, targets: jax.Array, axes: Axes) -> _Softmax:
    """Of this device's `logits` [n, v / tp]."""
    top = axes.tp.pmax(logits.max(-1))
    powers = jnp.exp(logits - top[:, None])
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32) + axes.tp.index() * logits.shape[1]
    hit = ids[None] == targets[:, None]
    total, chosen = axes.tp.psum(jnp.stack([powers.sum(-1), jnp.where(hit, logits, 0).sum(-1)]))
    return _Softmax(powers, total, hit, jnp.log(total) + top - chosen)


def token_scores(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, ids: int, axes: Axes, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(the sum as in `add_gradients`, the likeliest next id of the whole vocabulary at every position, int32 [b, s]).

    `head` [d, v / tp], of `ids` and padding.
    """

    def of_chunk(tokens: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = tokens
        logits = masked(dot(x, head, dtype=wide(x.dtype)), ids, axes)
        return _softmax(logits, targets, axes).entropy, likeliest(logits, axes)

    entropies, likely = _by_chunks(of_chunk, chunk, x, _known(targets, ids))
    return (entropies * weights.astype(entropies.dtype)).sum(), likely


def likeliest(logits: jax.Array, axes: Axes) -> jax.Array:
    """The id of the largest logit, int32 [n], of `logits` [n, v / tp]; of equal ones the lowest id.

    Where logits are NaN it is some id of the vocabulary."""
    top = axes.tp.pmax(logits.max(-1))
    mine = jnp.argmax(logits, -1).astype(jnp.int32) + axes.tp.index() * logits.shape[1]
    return -axes.tp.pmax(jnp.where(~(logits.max(-1) < top), -mine, jnp.iinfo(jnp.int32).min))


def _by_chunks(function: Callable[..., Any], chunk: int, *arrays: jax.Array) -> Any:
    """`function(arrays)` of all tokens, `chunk` of them at a time: each of its arrays [n] as [b, s]."""
    b, s = arrays[0].shape[:2]
    chunk = min(chunk, b * s)
    padding = -(b * s) % chunk

    def cut(a: jax.Array) -> jax.Array:
        flat = a.reshape(b * s, *a.shape[2:])
        return jnp.pad(flat, ((0, padding), *[(0, 0)] * (flat.ndim - 1))).reshape(-1, chunk, *a.shape[2:])

    values = lax.map(function, tuple(map(cut, arrays)))
    return jax.tree.map(lambda value: value.reshape(-1)[: b * s].reshape(b, s), values)
