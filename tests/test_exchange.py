"""Tokens sent to their experts and back are those that were gathered, forward and backward.

A CPU has no exchange of uneven parts: it is emulated here by what its documentation says, of gathered arrays.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from models import exchange
from models.axes import Axes, Axis

TOKENS, WIDTH, COUNT, PER_TOKEN = 12, 5, 8, 3


def emulated(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    whole = lambda a: lax.all_gather(a, axis_name)
    operands, starts, sizes, places = map(whole, (operand, input_offsets, send_sizes, output_offsets))
    me, row = lax.axis_index(axis_name), jnp.arange(len(output))
    for sender in range(len(operands)):
        at = row - places[sender, me]
        here = (at >= 0) & (at < sizes[sender, me])
        rows = operands[sender][jnp.clip(starts[sender, me] + at, 0, len(operand) - 1)]
        output = jnp.where(here[:, None], rows, output)
    return output


@pytest.mark.parametrize("skew", [0.0, 8.0], ids=["even", "most to one expert"])
def test_sent_rows_are_the_gathered_ones(skew: float, x64: None) -> None:
    rng = np.random.default_rng(0)
    tokens, matrices = rng.normal(size=(4 * TOKENS, WIDTH)), rng.normal(size=(COUNT, WIDTH, WIDTH))
    logits = rng.normal(size=(4 * TOKENS, COUNT)) + skew * (np.arange(COUNT) == 5)
    chosen = np.argsort(-logits, 1)[:, :PER_TOKEN].astype(np.int32)
    weights, g = rng.random((4 * TOKENS, PER_TOKEN)), rng.normal(size=(4 * TOKENS, WIDTH))
    axes = Axes(ep=Axis(("ep",), 4))
    mesh = Mesh(np.array(jax.devices()[:4]), ("ep",))

    def found(sends: bool) -> list[np.ndarray]:
        def program(tokens: jax.Array, weights: jax.Array, matrices: jax.Array, g: jax.Array) -> tuple:
            def mixed(tokens: jax.Array, weights: jax.Array, matrices: jax.Array) -> jax.Array:
                def compute(rows: jax.Array, sizes: jax.Array) -> jax.Array:
                    ends = jnp.cumsum(sizes)
                    expert = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right")
                    mine = (expert < len(sizes))[:, None]
                    return jnp.where(mine, jnp.einsum("nd,ndf->nf", rows, matrices[jnp.minimum(expert, 1)]), 0)

                if sends:
                    return exchange._sent(compute, tokens, weights, mine, COUNT, axes.ep)
                return exchange.exchanged(compute, tokens, weights, mine, COUNT, axes)

            mine = lax.dynamic_slice_in_dim(jnp.asarray(chosen), lax.axis_index("ep") * TOKENS, TOKENS)
            y, pull = jax.vjp(mixed, tokens, weights, matrices)
            return y, *pull(g)

        spec = P("ep")
        run = jax.shard_map(program, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4)
        with mock.patch.object(lax, "ragged_all_to_all", emulated):
            return [np.asarray(a) for a in jax.jit(run)(tokens, weights, matrices, g)]

    for one, other in zip(found(True), found(False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
