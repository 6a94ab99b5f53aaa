"""The grouped product on Hopper GPUs: tokamax's kernel for the product, ours for both gradients.

They visit the rows that there are, in tiles of one group each, and give the same bits again.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from models import hopper
from models.hopper import TILE
from models.layers import GROUPED
from models.opaque import opaque

PACKAGE = "tokamax._src.ops.ragged_dot.pallas_mosaic_gpu"
KERNELS = (f"{PACKAGE}_kernel_sm90", f"{PACKAGE}_common")


def refusal(device_kind: str, dtype: Any, *sizes: int) -> str | None:
    """Why they cannot serve rows and features of these `sizes`; None where they can."""
    reason = hopper.refusal(device_kind, dtype)
    if reason is None and any(size % TILE for size in sizes):
        rows, *features = sizes
        reason = f"{rows} rows of {' and '.join(map(str, features))} features are not all multiples of {TILE}"
    return reason or hopper.missing(KERNELS)


def _config() -> Any:
    """What tokamax takes on Hopper GPUs where it has not measured."""
    common = importlib.import_module(KERNELS[1])
    return common.Config(
        block_m=64,
        block_n=64,
        block_k=128,
        num_stages=2,
        split_k=1,
        persistent=False,
        grid_minor_dim=common.MatmulDimension.M,
        grid_tile_width=1,
    )


def _filled(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x`, and 0 in the rows of no group: the kernel leaves there what was in memory."""
    return jnp.where((jnp.arange(len(x), dtype=jnp.int32) < jnp.sum(sizes))[:, None], x, 0)


def _run_product(x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool) -> list[jax.Array]:
    if transposed:  # tokamax's would want a copy of the weights
        from models.grouped_gradients import row_gradient  # here: what it imports takes most of a second

        return [row_gradient(x, w.astype(x.dtype), sizes)]
    kernel = importlib.import_module(KERNELS[0]).ragged_dot_kernel
    return [_filled(kernel(x, w.astype(x.dtype), sizes, x.dtype, _config()), sizes)]


def _run_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array, *, dtype: Any) -> list[jax.Array]:
    from models.grouped_gradients import weight_gradient

    return [weight_gradient(x, g, sizes, jnp.dtype(dtype))]


PRODUCT = opaque(
    GROUPED,
    _run_product,
    lambda x, w, sizes, *, transposed: [((x.shape[0], w.shape[1 if transposed else 2]), x.dtype)],
    narrow=True,
)
GRADIENT = opaque(
    f"{GROUPED}_gradient",
    _run_gradient,
    lambda x, g, sizes, *, dtype: [((*sizes.shape, x.shape[1], g.shape[1]), dtype)],
    narrow=True,
)
