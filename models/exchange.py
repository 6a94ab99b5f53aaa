"""Tokens to the experts that they chose, on whichever device these are, and back.

Every expert takes all rows that chose it: no capacity, no token dropped. Sorting rows and putting them back are gathers
both ways, never a scatter of several rows into one, so a step repeats to the bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import Axes, Axis, program_device, vary_like
from models.recompute import keeps_arguments

Compute = Callable[[jax.Array, jax.Array], jax.Array]  # (rows [n, d] sorted by expert, rows of each) -> rows


def exchanged(
    compute: Compute, tokens: jax.Array, weights: jax.Array, chosen: jax.Array, count: int, axes: Axes
) -> jax.Array:
    """For each of `tokens` [n, d] the sum over its experts `chosen` [n, k], of `count`, with `weights` [n, k].

    `compute` has the experts of this device, those of others along ep follow in order. On GPUs each row is sent to its
    expert and back, n * k rows each way; elsewhere, where no exchange of uneven parts exists, all devices gather all
    tokens, compute what their experts have to say and scatter the sums. Both give the same numbers.
    """
    if axes.ep.names and program_device().platform == "gpu":
        return _sent(compute, tokens, weights, chosen, count, axes.ep)
    tokens, weights, chosen = (axes.ep.gather(a, dim=0) for a in (tokens, weights, chosen))
    held = count // axes.ep.size
    local = chosen.reshape(-1) - axes.ep.index() * held
    group = jnp.where((local >= 0) & (local < held), local, held)  # those of others behind all
    rows, order, inverse = _sorted(copied(tokens, chosen.shape[1]), group)
    y = permute(compute(rows, _counts(group, held)), inverse, order)
    return axes.ep.scatter(_weighted(y, weights).astype(tokens.dtype), dim=0)


def _sent(
    compute: Compute, tokens: jax.Array, weights: jax.Array, chosen: jax.Array, count: int, ep: Axis
) -> jax.Array:
    expert, held = chosen.reshape(-1), count // ep.size
    rows, order, inverse = _sorted(copied(tokens, chosen.shape[1]), expert)
    table = ep.gather(_counts(expert, count)[None], dim=0).reshape(ep.size, ep.size, held)  # rows: from, to, expert
    there, back = _ways(table.sum(-1), ep.index())
    arrived = _send(ep.names, len(rows) * ep.size, rows, there, back)  # room for all rows of all devices
    mine = lax.dynamic_index_in_dim(table, ep.index(), 1, keepdims=False)  # [from, expert], as they lie
    place = jnp.arange(len(arrived), dtype=jnp.int32)
    part = jnp.searchsorted(jnp.cumsum(mine.reshape(-1)), place, side="right")
    arrived, by_expert, by_sender = _sorted(arrived, jnp.where(part < mine.size, part % held, held))
    y = permute(compute(arrived, mine.sum(0)), by_sender, by_expert)
    y = _send(ep.names, len(rows), y, back, there)
    return _weighted(permute(y, inverse, order), weights).astype(tokens.dtype)


class Way(NamedTuple):
    """Of the rows that this device sends to each: where they begin, how many they are, where they begin there; and how
    many it receives of each."""

    start: jax.Array
    size: jax.Array
    place: jax.Array
    received: jax.Array


def _ways(sent: jax.Array, me: jax.Array | int) -> tuple[Way, Way]:
    """To the experts and back, of the rows `sent` [from, to]: by receiver on this side, by sender on the other."""
    begins = jnp.cumsum(sent, 1) - sent  # on the sender
    lands = jnp.cumsum(sent, 0) - sent  # on the receiver
    row = lambda a: lax.dynamic_index_in_dim(a, me, 0, keepdims=False)
    column = lambda a: lax.dynamic_index_in_dim(a, me, 1, keepdims=False)
    there = Way(row(begins), row(sent), row(lands), column(sent))
    return there, Way(column(lands), column(sent), column(begins), row(sent))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(names: tuple[str, ...], room: int, x: jax.Array, way: Way, back: Way) -> jax.Array:
    """What arrives, [room, d], zeros behind it; its gradient goes `back`."""
    empty = vary_like(jnp.zeros((room, x.shape[1]), x.dtype), x)
    name = names if len(names) > 1 else names[0]
    return lax.ragged_all_to_all(x, empty, *way[:3], way.received, axis_name=name)


def _send_forward(names: tuple[str, ...], room: int, x: jax.Array, way: Way, back: Way) -> tuple[jax.Array, Any]:
    return _send(names, room, x, way, back), (len(x), way, back)


def _send_backward(names: tuple[str, ...], room: int, kept: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    count, way, back = kept
    return _send(names, count, g, back, way), None, None


_send.defvjp(_send_forward, _send_backward)


def _sorted(rows: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows by group, their order, its inverse)."""
    order = jnp.argsort(group).astype(jnp.int32)
    inverse = jnp.argsort(order).astype(jnp.int32)
    return permute(rows, order, inverse), order, inverse


def _counts(group: jax.Array, count: int) -> jax.Array:
    """How many are in each of `count` groups."""
    return jnp.sum(jax.nn.one_hot(group, count, dtype=jnp.int32), 0, dtype=jnp.int32)


def _weighted(y: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums over the experts of each token."""
    return jnp.sum(y.reshape(*weights.shape, -1).astype(weights.dtype) * weights[..., None], 1)


def copied(tokens: jax.Array, times: int) -> jax.Array:
    """Each of `tokens` [n, d] `times` times, one behind another."""
    return jnp.broadcast_to(tokens[:, None], (len(tokens), times, tokens.shape[1])).reshape(-1, tokens.shape[1])


def placed(mine: jax.Array, axis: Axis) -> jax.Array:
    """All tokens along `axis`, of which `mine` [n, d] are this device's and the others zeros: a sum away from whole."""
    if not axis.names:
        return mine
    whole = vary_like(jnp.zeros((len(mine) * axis.size, mine.shape[1]), mine.dtype), mine)
    put = keeps_arguments(lambda mine: lax.dynamic_update_slice_in_dim(whole, mine, axis.index() * len(mine), 0))
    return put(mine)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of `x` in this order. Its gradient is a gather too: autodiff's scatter would add rows one by one."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)
