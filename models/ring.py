"""Attention over a sequence that is cut over devices, without any of them ever holding all keys (Liu et al.,
arXiv:2310.01889).

Keys and values go round in a ring. Each device meets those of one device after another and merges what it finds, by
the log-sum-exp of each query's logits. The backward goes round once more: it is given each query's output and
log-sum-exp of all keys, and computes the weights again. The sums of the keys' gradients travel behind them, and end at
home. A device's own keys never leave for their gradients, so each array makes one hop fewer than there are devices.

What arrives is sent on before it is worked on, so that the next keys travel meanwhile. Blocks of which nothing is seen
are skipped (`blockwise.py`); in zig-zag order that is half of the work of each step, on each device.

On CPUs the ring is unrolled: XLA runs there what does not depend on a loop beside it, and takes two exchanges of one
program that are under way at a time for the same one. The forward's loop, computed again, and the backward's first
exchanges mixed up keys, without an error, in half of the steps of four devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models import blockwise
from models.axes import Axis, program_device, vary, varying_axes
from models.blockwise import Gradients, Part, Sizes
from models.layers import wide
from models.recompute import keeps_arguments
from models.sight import Sight

Keys = tuple[jax.Array, jax.Array]  # keys and values, in blocks


def ring(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, cp: Axis, *, most: int) -> jax.Array:
    """Attention of this device's queries `q` [b, s, h, d] over the keys of all of `cp`, as [b, s, h, d]; `k` and `v`
    [b, s, kv, d] are its own part of them, the sight is over all, in the order of the devices.

    A query that sees nothing yields 0. Blocks have at most `most` tokens.
    """
    names = frozenset[str](cp.names).union(*map(varying_axes, jax.tree.leaves((q, k, v, sight))))
    # Cast out here, all vary over the same axes inside; the transposes of the casts sum the gradients where needed.
    q, k, v, sight = jax.tree.map(lambda x: vary(x, names), (q, k, v, sight))
    block = even(q.shape[1], most)
    cut = keeps_arguments(functools.partial(blockwise.heads_first, kv=k.shape[2], block=block))
    return _attention(_How(Sizes(block, *q.shape[1:3]), cp), cut(q), cut(k), cut(v), sight)


def even(tokens: int, most: int) -> int:
    """Tokens in a block, at most `most`, if the blocks are even in number and size: in zig-zag order none of them then
    reaches from a device's early tokens into its late ones."""
    half = -(-tokens // 2)
    return -(-half // -(-half // most))


class _How(NamedTuple):
    sizes: Sizes
    cp: Axis


class _Kept(NamedTuple):
    """What the backward is given."""

    q: jax.Array  # in blocks, as k and v, which are this device's own
    k: jax.Array
    v: jax.Array
    sight: Sight
    y: jax.Array  # [b, s, h, d]
    lse: jax.Array  # in blocks, of all keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    return _forward(how, q, k, v, sight)[0]


def _forward(how: _How, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> tuple[jax.Array, _Kept]:
    precise = wide(q.dtype)

    def met(found: Part, keys: Keys, step: jax.Array | int) -> Part:
        seen = _sight_at(how, sight, step)
        return merged(found, blockwise.attention_part(how.sizes, q, *keys, seen, dtype=precise))

    def pass_on(carry: tuple[Part, Keys], step: jax.Array) -> tuple[tuple[Part, Keys], None]:
        found, keys = carry
        following = jax.tree.map(how.cp.passed, keys)
        return (met(found, keys, step), following), None

    y = jnp.zeros_like(q, precise)
    nothing = Part(y, jnp.full_like(y[..., :1], jnp.finfo(precise).min))
    last = how.cp.size - 1
    (found, keys), _ = _in_turn(pass_on, (nothing, (k, v)), jnp.arange(last, dtype=jnp.int32))
    found = met(found, keys, last)
    y = blockwise.tokens_first(found.y.astype(q.dtype), how.sizes)
    return y, _Kept(q, k, v, sight, y, found.lse)


def _in_turn(step: Any, carry: Any, steps: jax.Array) -> tuple[Any, None]:
    return lax.scan(step, carry, steps, unroll=program_device().platform == "cpu")


def merged(one: Part, other: Part) -> Part:
    """Attention over the keys of both."""
    top = jnp.maximum(one.lse, other.lse)
    a, b = jnp.exp(one.lse - top), jnp.exp(other.lse - top)
    return Part((a * one.y + b * other.y) / (a + b), top + jnp.log(a + b))


class _Going(NamedTuple):
    """The state of the second ring: the sum of the queries' gradient so far, the keys that are here, and the gradients
    of those that were here one step before, by all devices that met them away from home."""

    q: jax.Array
    keys: Keys
    sums: Keys


def _backward(how: _How, kept: _Kept, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, sight, y, lse = kept
    given = blockwise.cotangents(how.sizes, k, y, g)
    passed = functools.partial(jax.tree.map, how.cp.passed)

    def gradients(keys: Keys, step: jax.Array | int) -> Gradients:
        seen = _sight_at(how, sight, step)
        return blockwise.gradients_part(how.sizes, q, *keys, seen, lse, given, dtype=wide(q.dtype))

    def met(going: _Going, following: Keys, step: jax.Array | int) -> _Going:
        arrived = passed(going.sums)
        new = gradients(going.keys, step)
        return _Going(going.q + new.q, following, jax.tree.map(jnp.add, arrived, (new.k, new.v)))

    def pass_on(going: _Going, step: jax.Array) -> tuple[_Going, None]:
        return met(going, passed(going.keys), step), None

    last = how.cp.size - 1
    keys = passed((k, v))
    own = gradients((k, v), 0)
    following = passed(keys) if last > 1 else keys
    away = gradients(keys, 1)
    going = _Going(own.q + away.q, following, (away.k, away.v))
    if last > 1:
        going, _ = _in_turn(pass_on, going, jnp.arange(2, last, dtype=jnp.int32))
        going = met(going, going.keys, last)
    g_k, g_v = jax.tree.map(jnp.add, (own.k, own.v), passed(going.sums))
    return going.q.astype(q.dtype), g_k.astype(k.dtype), g_v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _sight_at(how: _How, sight: Sight, step: jax.Array | int) -> Sight:
    """`sight` over those keys that are here after so many steps."""
    tokens = how.sizes.queries
    place = (how.cp.index() - step) % how.cp.size * tokens
    here: Any = lambda x: lax.dynamic_slice_in_dim(x, place, tokens, 1)
    return dataclasses.replace(sight, key_positions=here(sight.key_positions), key_segments=here(sight.key_segments))
