"""The gradients of a grouped product, as kernels for Hopper GPUs: of its weights, and of its rows.

The latter reads the weights as they lie, where a product with the weights transposed would want a copy of them. Each
group's rows are laid out in blocks of their own, filled up with zeros, so that the kernel multiplies whole blocks
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

        specs = [
            _tiles(x.dtype, BLOCK.rows, lambda number: (begin + number, i)),
            _tiles(g.dtype, BLOCK.rows, lambda number: (begin + number, j)),
        ]
        multiply = lambda total, x_block, g_block: gpu.wgmma(total, x_block.transpose((1, 0)), g_block)
        found = _summed((TILE, TILE), counts[group], multiply, specs, x_ref, g_ref)
        _store(found, out_ref, (group, pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)))

    a, b, groups = x.shape[1], g.shape[1], len(sizes)
    return gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((groups, a, b), dtype),
        grid=(a // TILE, b // TILE, groups),
        grid_names=("i", "j", "group"),
        kernel_name="grouped_weight_gradient",
        interpret=interpret,
    )(blocks.begins, blocks.counts, x, g)


def row_gradient(g: jax.Array, w: jax.Array, sizes: jax.Array, *, interpret: Any = None) -> jax.Array:
    """`g[rows] @ w[group].T` [n, a] in the dtype of `g`, for the rows of each group; 0 behind the last group.

    g [n, b] and w [groups, a, b], of 16 bits, a and b multiples of TILE; the rest as in `weight_gradient`.
    """
    blocks, (groups, a, b) = Blocks(BLOCK, len(g), sizes), w.shape
    apart, tiles = blocks.apart(g), a // TILE
    count = len(blocks.group)
    within = jnp.arange(count, dtype=jnp.int32) < jnp.sum(blocks.counts)
    steps = jnp.where(within, b // TILE, 0).astype(jnp.int32)  # of a block: none of an empty

    def body(of_block: Any, steps_ref: Any, g_ref: Any, w_ref: Any, out_ref: Any) -> None:
        i, block = jax.lax.axis_index("i"), jax.lax.axis_index("block")
        matrix = of_block[block] * tiles + i

        specs = [
            _tiles(g.dtype, BLOCK.rows, lambda number: (block, number)),
            _tiles(w.dtype, TILE, lambda number: (matrix, number)),
        ]
        multiply = lambda total, g_block, w_tile: gpu.wgmma(total, g_block, w_tile.transpose((1, 0)))
        found = _summed((BLOCK.rows, TILE), steps_ref[block], multiply, specs, g_ref, w_ref)
        _store(found, out_ref, (pl.ds(block * BLOCK.rows, BLOCK.rows), pl.ds(i * TILE, TILE)))

    found = gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(apart), a), g.dtype),
        grid=(tiles, count),
        grid_names=("i", "block"),
        kernel_name="grouped_row_gradient",
        interpret=interpret,
    )(blocks.group, steps, apart, w.reshape(groups * a, b))
    return blocks.together(found, len(g))


def _summed(shape: tuple[int, int], steps: Any, multiply: Any, specs: list[Any], *refs: Any) -> Any:
    """The sum [shape], in registers, of the products that `multiply(total, *tiles)` adds in each of the steps."""

    def run(total: Any) -> Any:
        def step(_: Any, *tiles: Any) -> None:
            multiply(total, *tiles)
            gpu.wgmma_wait(1)  # the one before: its tiles are free, as `delay_release` says

        gpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=STAGES)(*refs)
        return total[...]

    return pl.run_scoped(run, gpu.ACC(shape))


def _store(found: Any, out_ref: Any, place: tuple[Any, ...]) -> None:
    """Writes a tile from registers to its place in `out_ref`."""

    def store(tile: Any) -> None:
        tile[...] = found.astype(out_ref.dtype)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(tile, out_ref.at[place])
        gpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(store, gpu.SMEM(found.shape, out_ref.dtype, transforms=_swizzled(out_ref.dtype)))


def _swizzled(dtype: Any) -> tuple[Any, ...]:
    """How a block of `dtype` lies in shared memory."""
    return gpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), gpu.SwizzleTransform(SWIZZLE)


def _tiles(dtype: Any, rows: int, place: Any) -> Any:
    """Tiles of TILE columns, the one of each step at `place(number)`."""
    return gpu.BlockSpec((rows, TILE), place, transforms=_swizzled(dtype), delay_release=1)
