"""The gradient of the weights of a grouped product, as a kernel for Hopper GPUs.

Each group's rows are laid out in blocks of their own, filled up with zeros, so that the kernel multiplies whole blocks
straight from shared memory. (The kernel of tokamax 0.0.17 masks rows in registers and writes them for the next block
while the tensor cores may still read them, which PTX leaves undefined: on an H200 the gradients of 8 experts were off
by 2.6%, those of 64 by 5.8%.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from models.group_blocks import Blocks, Form
from models.hopper import TILE

BLOCK = Form(64, every=True)
STAGES = 4  # blocks that are in shared memory at a time
SWIZZLE = 128  # bytes


def weight_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array, dtype: Any, *, interpret: Any = None) -> jax.Array:
    """`x[rows].T @ g[rows]` [groups, a, b] in `dtype`, for the rows of each group.

    x [n, a] and g [n, b], of 16 bits, a and b multiples of TILE, are sorted by group: the first `sizes[0]` rows, the
    next `sizes[1]`, ...; rows behind them count for nothing. `interpret`: jax's simulation of the kernel on a CPU.
    """
    blocks = Blocks(BLOCK, len(x), sizes)
    x, g = blocks.apart(x), blocks.apart(g)

    def body(begins: Any, counts: Any, x_ref: Any, g_ref: Any, out_ref: Any) -> None:
        i, j, group = (jax.lax.axis_index(name) for name in ("i", "j", "group"))
        begin = begins[group]

        def multiply(total: Any) -> Any:
            def step(_: Any, x_block: Any, g_block: Any) -> None:
                gpu.wgmma(total, x_block.transpose((1, 0)), g_block)
                gpu.wgmma_wait(1)  # the one before: its block is free, as `delay_release` says

            gpu.emit_pipeline(
                step,
                grid=(counts[group],),
                in_specs=[_blocks(x.dtype, begin, i), _blocks(g.dtype, begin, j)],
                max_concurrent_steps=STAGES,
            )(x_ref, g_ref)
            return total[...]

        found = pl.run_scoped(multiply, gpu.ACC((TILE, TILE)))

        def store(tile: Any) -> None:
            tile[...] = found.astype(dtype)
            gpu.commit_smem()
            place = (group, pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE))
            gpu.copy_smem_to_gmem(tile, out_ref.at[place])
            gpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(store, gpu.SMEM((TILE, TILE), dtype, transforms=_swizzled(dtype)))

    a, b, groups = x.shape[1], g.shape[1], len(sizes)
    return gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((groups, a, b), dtype),
        grid=(a // TILE, b // TILE, groups),
        grid_names=("i", "j", "group"),
        kernel_name="grouped_weight_gradient",
        interpret=interpret,
    )(blocks.begins, blocks.counts, x, g)


def _swizzled(dtype: Any) -> tuple[Any, ...]:
    """How a block of `dtype` lies in shared memory."""
    return gpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), gpu.SwizzleTransform(SWIZZLE)


def _blocks(dtype: Any, begin: jax.Array, column: jax.Array) -> Any:
    """The blocks from `begin` on, of the tile `column`."""
    return gpu.BlockSpec(
        (BLOCK.rows, TILE), lambda number: (begin + number, column), transforms=_swizzled(dtype), delay_release=1
    )
