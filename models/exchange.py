"""Tokens to the experts that they chose, on whichever device these are, and back.

Every expert takes all rows that chose it: no capacity, no token dropped. Sorting rows and putting them back are gathers
both ways, never a scatter of several rows into one, so a step repeats to the bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import Axes, Axis, vary_like
from models.recompute import keeps_arguments

Compute = Callable[[jax.Array, jax.Array], jax.Array]  # (rows [n, d] sorted by expert, rows of each) -> rows


def exchanged(
    compute: Compute, tokens: jax.Array, weights: jax.Array, chosen: jax.Array, count: int, axes: Axes
) -> jax.Array:
    """For each of `tokens` [n, d] the sum over its experts `chosen` [n, k], of `count`, with `weights` [n, k].

    `compute` has the experts of this device, of which those of others along ep follow in order. Tokens and what was
    chosen are gathered over ep, each device computes what its experts have to say, and the sums are scattered again.
    """
    tokens, weights, chosen = (axes.ep.gather(a, dim=0) for a in (tokens, weights, chosen))
    held = count // axes.ep.size
    local = chosen.reshape(-1) - axes.ep.index() * held
    group = jnp.where((local >= 0) & (local < held), local, held)  # those of others behind all
    order = jnp.argsort(group).astype(jnp.int32)
    inverse = jnp.argsort(order).astype(jnp.int32)
    sizes = jnp.sum(jax.nn.one_hot(group, held, dtype=jnp.int32), 0, dtype=jnp.int32)
    y = permute(compute(permute(copied(tokens, chosen.shape[1]), order, inverse), sizes), inverse, order)
    y = jnp.sum(y.reshape(*chosen.shape, -1).astype(weights.dtype) * weights[..., None], 1).astype(tokens.dtype)
    return axes.ep.scatter(y, dim=0)


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
