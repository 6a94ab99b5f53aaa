"""How attention reaches over the devices of cp, each of which has a part of the sequence: the one place that picks.

    gather  every device gathers all keys and values, its own queries meet them
    ring    keys and values go round from device to device (`ring.py`)
    heads   all tokens of a part of the heads come to each device, and go back afterwards (Jacobs et al.,
            arXiv:2309.14509)

docs/parallel.md tells what each sends, and which to pick. All compute the same.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from models import attention
from models.attention import attend
from models.axes import Axes
from models.ring import ring
from models.sight import Sight, everywhere, in_order, in_zigzag

GATHER, RING, HEADS = CONTEXTS = ("gather", "ring", "heads")


def rows_are_whole(axes: Axes) -> bool:
    """Whether a device meets all tokens of a row at once, in their order."""
    return axes.cp.size == 1 or axes.context == HEADS


def prepared(sight: Sight, axes: Axes) -> Sight:
    """`sight`, of this device's queries over the keys of all of cp, as `attend_across` takes it: once per program, not
    in each layer.

    Of tokens that lie in zig-zag order over cp, as `sight.zigzag` then says.
    """
    if axes.cp.size == 1 or axes.context == GATHER:
        return attention.prepared(sight)
    if axes.context == RING:
        return sight
    positions, segments = sight.key_positions, sight.key_segments
    if sight.zigzag is not None:
        positions, segments = (in_order(x, sight.zigzag) for x in (positions, segments))
        sight = dataclasses.replace(sight, zigzag=1)
    return attention.prepared(
        dataclasses.replace(
            sight, positions=positions, segments=segments, key_positions=positions, key_segments=segments
        )
    )


def attend_across(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight | None, axes: Axes) -> jax.Array:
    """Attention of this device's queries `q` [b, s, h, d] over the keys of all of cp, of which `k` and `v`
    [b, s, kv, d] are its own, as [b, s, h, d].

    The sight is `prepared`; None: every query sees every key.
    """
    if axes.cp.size == 1 or axes.context == GATHER:
        return attend(q, axes.cp.gather(k, dim=1), axes.cp.gather(v, dim=1), sight)
    if axes.context == HEADS:
        return _by_heads(q, k, v, sight, axes)
    if sight is None:
        sight = everywhere(q, jax.ShapeDtypeStruct((k.shape[0], k.shape[1] * axes.cp.size), k.dtype))
    return ring(q, k, v, sight, axes.cp, most=attention.plain_block("none serves context='ring'"))


def _by_heads(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight | None, axes: Axes) -> jax.Array:
    """`attend` of whole rows, for this device's part of the heads."""
    cp, zigzag = axes.cp, sight is not None and sight.zigzag is not None
    # each device gets the keys of its queries' heads: where these are fewer than the devices, several get the same
    repeats = math.lcm(k.shape[2], cp.size) // k.shape[2]

    def come(x: jax.Array) -> jax.Array:
        x = cp.exchange(x, cut=2, join=1)
        return in_order(x, cp.size) if zigzag else x

    k, v = (jnp.repeat(x, repeats, 2) for x in (k, v))
    y = attend(come(q), come(k), come(v), sight)
    return cp.exchange(in_zigzag(y, cp.size) if zigzag else y, cut=1, join=2)
