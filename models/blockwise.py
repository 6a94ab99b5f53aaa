"""Attention in blocks: memory grows with the sequence, not with its square.

The forward passes over the keys with a softmax that is corrected as their blocks go by (Rabe and Staats,
arXiv:2112.05682). The backward is given each query's output and log-sum-exp, and computes the weights of a block again
(Dao et al., arXiv:2205.14135, appendix B). A block of queries meets those blocks of keys alone of which it may see
something.

Heads come before tokens, and those that share keys lie behind each other, so that each product is one of matrices
[queries, d] and [keys, d] as they lie in memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import vary, varying_axes
from models.layers import wide
from models.recompute import keeps_arguments
from models.sight import Sight

State = TypeVar("State")


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, *, block: int) -> jax.Array:
    """Attention of `q` [b, q, h, d] over `k`, `v` [b, k, kv, d], h a multiple of kv, as [b, q, h, d].

    A query that sees nothing yields 0. Blocks have `block` tokens, which needs to divide nothing.
    """
    names = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((q, k, v, sight))))
    # Cast out here, all vary over the same axes inside; the transposes of the casts sum the gradients where needed.
    q, k, v, sight = jax.tree.map(lambda x: vary(x, names), (q, k, v, sight))
    cut = keeps_arguments(functools.partial(heads_first, kv=k.shape[2], block=block))
    return _attention(Sizes(block, *q.shape[1:3]), cut(q), cut(k), cut(v), sight)


class Sizes(NamedTuple):
    """What the shapes of blocks do not tell."""

    block: int
    queries: int
    heads: int


class Part(NamedTuple):
    """Attention of blocks of queries over some of the keys: all, or those of one device."""

    y: jax.Array  # [n, b, kv, h / kv * q, d]
    lse: jax.Array  # log-sum-exp of each query's logits, lowest where it sees nothing, [n, b, kv, h / kv * q, 1]


class Gradients(NamedTuple):
    """Sums over some pairs of blocks: of one block of queries, of all blocks of keys."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class _Queries(NamedTuple):
    """Blocks of queries, a leading dim where there are many. Heads of the same keys lie behind each other."""

    q: jax.Array  # [b, kv, h / kv * q, d]
    positions: jax.Array  # [b, q]
    segments: jax.Array  # [b, q]


class _Keys(NamedTuple):
    """Blocks of keys, a leading dim where there are many."""

    k: jax.Array  # [b, kv, k, d]
    v: jax.Array  # [b, kv, k, d]
    positions: jax.Array  # [b, k]
    segments: jax.Array  # [b, k]


class _Running(NamedTuple):
    """The softmax of a block of queries, after some of the keys."""

    top: jax.Array  # largest logit, [b, kv, h / kv * q, 1]
    total: jax.Array  # of the weights exp(logit - top)
    y: jax.Array  # sum of the values by these weights, [b, kv, h / kv * q, d]


class _Kept(NamedTuple):
    """What the backward is given."""

    q: jax.Array  # in blocks, as k and v
    k: jax.Array
    v: jax.Array
    sight: Sight
    y: jax.Array  # [b, q, h, d]
    lse: jax.Array  # in blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    return _forward(sizes, q, k, v, sight)[0]


def _forward(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> tuple[jax.Array, _Kept]:
    found = attention_part(sizes, q, k, v, sight, dtype=q.dtype)
    y = tokens_first(found.y, sizes)
    return y, _Kept(q, k, v, sight, y, found.lse)


def _backward(sizes: Sizes, kept: _Kept, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, sight, y, lse = kept
    cotangent = cotangents(sizes, k, y, g)
    found = gradients_part(sizes, q, k, v, sight, lse, cotangent, dtype=q.dtype)
    return found.q, found.k.astype(k.dtype), found.v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def attention_part(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, *, dtype: Any) -> Part:
    """Attention of `q` over `k` and `v`, all in blocks, as `dtype`."""
    queries, keys = _cut(sizes, q, k, v, sight)
    lowest = jnp.finfo(wide(q.dtype)).min

    def over_keys(query: _Queries) -> Part:
        def absorb(j: jax.Array, running: _Running) -> _Running:
            key = _at(keys, j)
            logits = _logits(query, key, sight)
            top = jnp.maximum(running.top, logits.max(-1, keepdims=True))
            weights, shrink = jnp.exp(logits - top), jnp.exp(running.top - top)
            y = _product("bnqk,bnkd->bnqd", weights.astype(v.dtype), key.v)
            return _Running(top, running.total * shrink + weights.sum(-1, keepdims=True), running.y * shrink + y)

        y = jnp.zeros_like(query.q, wide(q.dtype))
        start = _Running(jnp.full_like(y[..., :1], lowest), y[..., :1], y)
        top, total, y = _partners(query, keys, sight).each(absorb, start)
        total = jnp.where(total > 0, total, 1)
        return Part((y / total).astype(dtype), top + jnp.log(total))

    return lax.map(over_keys, queries)


class Cotangents(NamedTuple):
    """What comes back to the blocks of queries."""

    g: jax.Array  # of the outputs
    shift: jax.Array  # of each query, off its weights' gradients


def cotangents(sizes: Sizes, k: jax.Array, y: jax.Array, g: jax.Array) -> Cotangents:
    """In blocks, of outputs `y` and their cotangent `g`, [b, q, h, d]."""
    shift = (g.astype(wide(g.dtype)) * y).sum(-1, keepdims=True)
    return Cotangents(*(heads_first(x, k.shape[2], sizes.block) for x in (g, shift)))


def gradients_part(
    sizes: Sizes,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sight: Sight,
    lse: jax.Array,
    given: Cotangents,
    *,
    dtype: Any,
) -> Gradients:
    """What `k` and `v` add to the gradient of `q`, as `dtype`, and `q` to theirs, in blocks and at least float32.

    `lse` and `given` are of all keys that the queries see, whichever of them `k` holds.
    """
    queries, keys = _cut(sizes, q, k, v, sight)

    def over_keys(
        sums: tuple[jax.Array, jax.Array], given: tuple[_Queries, Cotangents, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        query, (g, shift), lse = given

        def add(j: jax.Array, sums: Gradients) -> Gradients:
            key = _at(keys, j)
            weights = jnp.exp(_logits(query, key, sight) - lse)
            g_weights = _product("bnqd,bnkd->bnqk", g, key.v)
            g_logits = (weights * (g_weights - shift) * _scale(q)).astype(q.dtype)
            return Gradients(
                sums.q + _product("bnqk,bnkd->bnqd", g_logits, key.k),
                _add_at(sums.k, j, _product("bnqk,bnqd->bnkd", g_logits, query.q)),
                _add_at(sums.v, j, _product("bnqk,bnqd->bnkd", weights.astype(g.dtype), g)),
            )

        zero = jnp.zeros_like(query.q, wide(q.dtype))
        g_q, g_k, g_v = _partners(query, keys, sight).each(add, Gradients(zero, *sums))
        return (g_k, g_v), g_q.astype(dtype)

    zeros = jnp.zeros_like(k, wide(k.dtype)), jnp.zeros_like(v, wide(v.dtype))
    (g_k, g_v), g_q = lax.scan(over_keys, zeros, (queries, given, lse))
    return Gradients(g_q, g_k, g_v)


class _Partners(NamedTuple):
    """The blocks of keys of which a block of queries may see something."""

    order: jax.Array  # all blocks of keys, those first
    number: jax.Array  # of those

    def each(self, function: Callable[[jax.Array, State], State], state: State) -> State:
        """`function(number of a block of keys, state)` over all of them in turn."""
        return lax.fori_loop(0, self.number, lambda i, state: function(self.order[i], state), state)


def _partners(query: _Queries, keys: _Keys, sight: Sight) -> _Partners:
    """Those of one block of queries."""
    seen = jax.vmap(lambda key: _pair(query, key, sight).overlaps())(keys)
    return _Partners(jnp.argsort(~seen, stable=True).astype(jnp.int32), seen.sum(dtype=jnp.int32))


def _logits(query: _Queries, key: _Keys, sight: Sight) -> jax.Array:
    """Logits [b, kv, h / kv * q, k], -inf where the key is not seen."""
    logits = _product("bnqd,bnkd->bnqk", query.q, key.k) * _scale(query.q)
    mask = _pair(query, key, sight).mask()
    each = logits.reshape(*logits.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], each, -jnp.inf).reshape(logits.shape)


def _pair(query: _Queries, key: _Keys, sight: Sight) -> Sight:
    """`sight` between one block of queries and one of keys."""
    return dataclasses.replace(
        sight,
        positions=query.positions,
        segments=query.segments,
        key_positions=key.positions,
        key_segments=key.segments,
    )


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=wide(a.dtype))


def _scale(q: jax.Array) -> float:
    return q.shape[-1] ** -0.5


def _at(blocks: _Keys, j: jax.Array) -> _Keys:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), blocks)


def _add_at(sums: jax.Array, j: jax.Array, x: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(sums, lax.dynamic_index_in_dim(sums, j, keepdims=False) + x, j, 0)


def _cut(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> tuple[_Queries, _Keys]:
    """All blocks; what sticks out of the last ones is padding, which neither sees nor is seen."""
    cut = lambda x: _blocks(x, sizes.block)
    queries = _Queries(q, cut(sight.positions), cut(sight.segments))
    return queries, _Keys(k, v, cut(sight.key_positions), cut(sight.key_segments))


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """`x` [b, s, ...], filled up with zeros, as blocks [n, b, block, ...]."""
    size = min(block, x.shape[1])
    x = jnp.pad(x, [(0, -x.shape[1] % size if dim == 1 else 0) for dim in range(x.ndim)])
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def heads_first(x: jax.Array, kv: int, block: int) -> jax.Array:
    """`x` [b, s, h, d] as blocks [n, b, kv, h / kv * block, d]."""
    x = _blocks(x, block)
    n, b, size, h, d = x.shape
    return x.reshape(n, b, size, kv, h // kv, d).transpose(0, 1, 3, 4, 2, 5).reshape(n, b, kv, -1, d)


def tokens_first(blocks: jax.Array, sizes: Sizes) -> jax.Array:
    """The inverse of `heads_first`, for queries: blocks [n, b, kv, h / kv * block, d] as [b, s, h, d]."""
    n, b, kv, _, d = blocks.shape
    x = blocks.reshape(n, b, kv, sizes.heads // kv, -1, d).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, -1, sizes.heads, d)[:, : sizes.queries]
