"""Attention in blocks: memory grows with the sequence, not with its square.

The forward passes over the keys with a softmax that is corrected as their blocks go by (Rabe and Staats,
arXiv:2112.05682). The backward is given each query's output and log-sum-exp, and computes the weights of a block again
(Dao et al., arXiv:2205.14135, appendix B). Pairs of blocks in which no query can see a key are skipped.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import vary, varying_axes
from models.layers import wide
from models.sight import Sight


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, *, block: int) -> jax.Array:
    """Attention of `q` [b, q, h, d] over `k`, `v` [b, k, kv, d], h a multiple of kv, as [b, q, h, d].

    A query that sees nothing yields 0. Blocks have `block` tokens, which needs to divide nothing.
    """
    names = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((q, k, v, sight))))
    # Cast out here, all vary over the same axes inside; the transposes of the casts sum the gradients where needed.
    q, k, v, sight = jax.tree.map(lambda x: vary(x, names), (q, k, v, sight))
    b, s, h, d = q.shape
    grouped = q.reshape(b, s, k.shape[2], h // k.shape[2], d)
    return _attention(block, grouped, k, v, sight).reshape(q.shape)


class _Queries(NamedTuple):
    """Blocks of queries, a leading dim where there are many."""

    q: jax.Array  # [b, q, kv, h / kv, d]
    positions: jax.Array  # [b, q]
    segments: jax.Array  # [b, q]


class _Keys(NamedTuple):
    """Blocks of keys, a leading dim where there are many."""

    k: jax.Array  # [b, k, kv, d]
    v: jax.Array  # [b, k, kv, d]
    positions: jax.Array  # [b, k]
    segments: jax.Array  # [b, k]


class _Running(NamedTuple):
    """The softmax of a block of queries, after some of the keys."""

    top: jax.Array  # largest logit, [b, kv, h / kv, q]
    total: jax.Array  # of the weights exp(logit - top)
    y: jax.Array  # sum of the values by these weights, [b, kv, h / kv, q, d]


class _Sums(NamedTuple):
    """Gradients of keys and values, in blocks, after some of the queries."""

    k: jax.Array
    v: jax.Array


class _Kept(NamedTuple):
    """What the backward is given."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sight: Sight
    y: jax.Array
    lse: jax.Array  # log-sum-exp of each query's logits, [b, kv, h / kv, q]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(block: int, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    return _forward(block, q, k, v, sight)[0]


def _forward(block: int, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> tuple[jax.Array, _Kept]:
    given = q, k, v, sight  # not what is tied: the sight is the same in all layers, and kept once
    # A scan over layers hoists what depends on `sight` alone, which is the masks of all pairs of blocks; tied to the
    # queries they are made where they are used.
    q, sight = lax.optimization_barrier((q, sight))
    queries, keys = _cut(block, q, k, v, sight)

    def over_keys(query: _Queries) -> tuple[jax.Array, jax.Array]:
        def step(running: _Running, key: _Keys) -> tuple[_Running, None]:
            def absorb(running: _Running) -> _Running:
                logits, mask = _logits(query, key, sight)
                top = jnp.maximum(running.top, jnp.where(mask, logits, lowest).max(-1))
                weights = jnp.where(mask, jnp.exp(logits - top[..., None]), 0)
                shrink = jnp.exp(running.top - top)
                y = _product("bngqk,bknd->bngqd", weights.astype(v.dtype), key.v)
                return _Running(top, running.total * shrink + weights.sum(-1), running.y * shrink[..., None] + y)

            return lax.cond(_pair(query, key, sight).overlaps(), absorb, lambda same: same, running), None

        y = jnp.zeros_like(query.q, wide(q.dtype)).transpose(0, 2, 3, 1, 4)
        lowest = jnp.finfo(y.dtype).min
        running, _ = lax.scan(step, _Running(jnp.full_like(y[..., 0], lowest), y[..., 0], y), keys)
        seen = running.total > 0
        total = jnp.where(seen, running.total, 1)
        y = (running.y / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)
        return y, jnp.where(seen, running.top + jnp.log(total), 0)

    y, lse = lax.map(over_keys, queries)
    y = _join(y, q.shape[1])
    return y, _Kept(*given, y, lse)


def _backward(block: int, kept: _Kept, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, sight, y, lse = kept
    queries, keys = _cut(block, q, k, v, sight)
    shift = (g.astype(wide(g.dtype)) * y).sum(-1).transpose(0, 2, 3, 1)  # of each query, off its weights' gradients

    def over_keys(sums: _Sums, given: tuple[_Queries, jax.Array, jax.Array, jax.Array]) -> tuple[_Sums, jax.Array]:
        query, g, shift, lse = given

        def step(g_q: jax.Array, given: tuple[_Keys, _Sums]) -> tuple[jax.Array, _Sums]:
            key, sums = given

            def add(g_q: jax.Array, sums: _Sums) -> tuple[jax.Array, _Sums]:
                logits, mask = _logits(query, key, sight)
                weights = jnp.where(mask, jnp.exp(logits - lse[..., None]), 0)
                g_weights = _product("bqngd,bknd->bngqk", g, key.v)
                g_logits = (weights * (g_weights - shift[..., None]) * _scale(q)).astype(q.dtype)
                g_k = _product("bngqk,bqngd->bknd", g_logits, query.q)
                g_v = _product("bngqk,bqngd->bknd", weights.astype(g.dtype), g)
                return g_q + _product("bngqk,bknd->bqngd", g_logits, key.k), _Sums(sums.k + g_k, sums.v + g_v)

            return lax.cond(_pair(query, key, sight).overlaps(), add, lambda *same: same, g_q, sums)

        g_q, sums = lax.scan(step, jnp.zeros_like(query.q, wide(q.dtype)), (keys, sums))
        return sums, g_q.astype(q.dtype)

    zeros = _Sums(jnp.zeros_like(keys.k, wide(k.dtype)), jnp.zeros_like(keys.v, wide(v.dtype)))
    given = queries, _blocks(g, 1, block), _blocks(shift, 3, block), lse
    sums, g_q = lax.scan(over_keys, zeros, given)
    g_k, g_v = (_join(x, k.shape[1]).astype(k.dtype) for x in sums)
    return _join(g_q, q.shape[1]), g_k, g_v, None


_attention.defvjp(_forward, _backward)


def _logits(query: _Queries, key: _Keys, sight: Sight) -> tuple[jax.Array, jax.Array]:
    """Logits [b, kv, h / kv, q, k], and which of them count."""
    logits = _product("bqngd,bknd->bngqk", query.q, key.k) * _scale(query.q)
    return logits, _pair(query, key, sight).mask()[:, None, None]


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


def _cut(block: int, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> tuple[_Queries, _Keys]:
    """All blocks; what sticks out of the last ones is padding, which neither sees nor is seen."""
    queries = _Queries(q, sight.positions, sight.segments)
    keys = _Keys(k, v, sight.key_positions, sight.key_segments)
    return jax.tree.map(lambda x: _blocks(x, 1, block), (queries, keys))


def _blocks(x: jax.Array, dim: int, block: int) -> jax.Array:
    """`x` with `dim`, filled up with zeros, in blocks along a new first dim."""
    size = min(block, x.shape[dim])
    x = jnp.pad(x, [(0, -x.shape[dim] % size if i == dim else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :]), dim, 0)


def _join(blocks: jax.Array, length: int) -> jax.Array:
    """Blocks [n, b, block, ...] as the first `length` tokens [b, length, ...]."""
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]
