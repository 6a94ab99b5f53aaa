"""The grouped product: rows sorted by group, each group's rows times the group's own matrix.

Rows are cut into blocks of one group each, whose last one is not full. A loop over the blocks slices a block's rows and
its group's matrix, multiplies them, and writes what belongs to the group: work grows with the rows and not with the
groups, but for a block of each, and no row is copied into another order. `lax.ragged_dot` would do all rows with all
groups: XLA expands it into a masked dense product, on CPUs and, as programs compiled for an H100 show (jax 0.10.2 and
0.12.0.1, all three products, with its options for grouped kernels too), on GPUs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models import grouped_kernels
from models.axes import program_device, vary_like
from models.group_blocks import Blocks, Form
from models.grouped_kernels import refusal
from models.hopper import say
from models.layers import GROUPED, wide
from models.opaque import opaque
from models.weight import Pair, Weight, in_order, products, split

Kept = tuple[jax.Array, jax.Array, jax.Array]
# Platform -> least and most rows of a block. On a CPU core 4,096 tokens of 4 experts each (float32, 512 x 1,024
# features, forward and back) took 0.66, 0.57 and 0.50 s of its time in blocks of 64, 96 and 256 rows with 8 experts,
# 0.77, 0.71 and 0.67 s with 64: in small ones it matters least over how many experts the rows are spread. On a GPU a
# turn is five kernels, each as long as its launch while blocks are small, so blocks grow with the rows of an expert.
BLOCKS = {"cpu": (64, 64), "gpu": (64, 512)}


class How(NamedTuple):
    """A product of `grouped_dots`: columns of each weight, precision of their gradients (None: none is wanted), its
    form (None: the kernels of models/grouped_kernels.py), and whether its weights have a pair."""

    widths: tuple[int, ...]
    gradient: Any
    form: Form | None
    paired: bool = False


def grouped_dot(x: jax.Array, w: jax.Array | Weight, sizes: jax.Array) -> jax.Array:
    """`x` [n, a] times `w` [g, a, b], the first `sizes[0]` rows with `w[0]`, the next `sizes[1]` with `w[1]`, ...

    Rows behind the sum of `sizes` [g] yield 0, and what they hold reaches no gradient. Precision is that of
    `models.layers.dot`.
    """
    (y,) = grouped_dots(x, sizes, w)
    return y


def grouped_dots(x: jax.Array, sizes: jax.Array, *weights: jax.Array | Weight) -> list[jax.Array]:
    """`grouped_dot` of `x` with each of `weights`; in one product where the trainer laid them side by side."""
    found = []
    for product in products(weights):
        (value, taps, shapes, places, _), paired = product, product.has_pair
        x = vary_like(x, value)
        like = functools.partial(vary_like, other=x)
        widths = tuple(shape[-1] for shape in shapes)
        how = How(widths, taps[0].dtype if taps and not paired else None, pick(x, value), paired)
        y = _grouped_dot(how, x, like(value), taps if paired else tuple(map(like, taps)), sizes)
        product.tell(functools.partial(gradients, how), Pair(x, y, sizes.astype(wide(x.dtype))))
        found.append((places, split(y, widths)))
    return in_order(found)


def pick(x: jax.Array, w: jax.Array) -> Form | None:
    """How `x` [n, a] is multiplied with `w` [g, a, b] on the platform that the program is for.

    On Hopper GPUs the kernels of tokamax serve, where it is installed, in 16 bits, if n, a and b are multiples of 128.
    Anything else goes in blocks of half the rows of a mean group, as a power of two within the bounds of BLOCKS. On a
    GPU their loop has a fixed number of turns, as many as any sizes need: the host would wait for the device at each
    turn of another. `lax.ragged_dot` is never picked (see above).
    """
    device, (groups, _, columns) = program_device(), w.shape
    if device.platform == "gpu":
        reason = refusal(device.device_kind, x.dtype, *x.shape, columns)
        if reason is None:
            return None
        say("products of experts go", reason)
    least, most = BLOCKS.get(device.platform, BLOCKS["gpu"])
    half = 1 << max(len(x) // (2 * groups), 1).bit_length() - 1
    return Form(min(len(x), max(least, min(most, half))), device.platform != "cpu")


# -- in blocks ---------------------------------------------------------------------------------------------------------


def _run_product(x: jax.Array, w: jax.Array, sizes: jax.Array, *, form: Form, transposed: bool) -> list[jax.Array]:
    blocks = Blocks(form, len(x), sizes)
    summed, kept = (2, 1) if transposed else (1, 2)

    def step(number: jax.Array, y: jax.Array) -> jax.Array:
        block = blocks[number]
        matrix = lax.dynamic_index_in_dim(w, block.group, keepdims=False).astype(x.dtype)
        new = lax.dot_general(
            blocks.of(x, block), matrix, (((1,), (summed - 1,)), ((), ())), preferred_element_type=x.dtype
        )
        new = jnp.where(block.mine, new, blocks.of(y, block))
        return lax.dynamic_update_slice_in_dim(y, new, block.start, 0)

    return [lax.fori_loop(0, blocks.count, step, jnp.zeros((len(x), w.shape[kept]), x.dtype))]


def _run_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array, *, form: Form, dtype: Any) -> list[jax.Array]:
    blocks = Blocks(form, len(x), sizes)

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        block = blocks[number]
        # both: another group's rows may be no numbers
        ours, theirs = (jnp.where(block.mine, blocks.of(a, block), 0) for a in (x, g))
        new = lax.dot_general(ours, theirs, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return total.at[block.group].add(new)

    return [lax.fori_loop(0, blocks.count, step, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), dtype))]


PRODUCT = opaque(
    GROUPED,
    _run_product,
    lambda x, w, sizes, *, form, transposed: [((x.shape[0], w.shape[1 if transposed else 2]), x.dtype)],
)
GRADIENT = opaque(
    f"{GROUPED}_gradient",
    _run_gradient,
    lambda x, g, sizes, *, form, dtype: [((*sizes.shape, x.shape[1], g.shape[1]), dtype)],
)


# -- the product and its gradients -------------------------------------------------------------------------------------


def _product(how: How, x: jax.Array, w: jax.Array, taps: Any, sizes: jax.Array) -> jax.Array:
    return _multiply(how, x, w, sizes, transposed=False)


def _multiply(how: How, x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    if how.form is None:
        return grouped_kernels.PRODUCT.bind(x, w, sizes, transposed=transposed)[0]
    return PRODUCT.bind(x, w, sizes, form=how.form, transposed=transposed)[0]


def _gradient(how: How, x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    precise = wide(jnp.promote_types(x.dtype, how.gradient))
    if how.form is None:
        return grouped_kernels.GRADIENT.bind(x, g, sizes, dtype=precise)[0]
    return GRADIENT.bind(x, g, sizes, form=how.form, dtype=precise)[0]


def _grouped_forward(how: How, x: jax.Array, w: jax.Array, taps: Any, sizes: jax.Array) -> tuple[jax.Array, Kept]:
    # not through `_grouped_dot`: a checkpoint policy that keeps products would not see this one
    return _product(how, x, w, taps, sizes), (x, w, sizes)


def _grouped_backward(how: How, kept: Kept, g: jax.Array) -> tuple[jax.Array, None, tuple[jax.Array | Pair, ...], None]:
    x, w, sizes = kept
    g = g.astype(x.dtype)
    g_x = _multiply(how, g, w, sizes, transposed=True)
    if how.paired:
        return g_x, None, (Pair(x, g, sizes.astype(wide(x.dtype))),), None
    return g_x, None, () if how.gradient is None else gradients(how, Pair(x, g, sizes)), None


def gradients(how: How, pair: Pair) -> tuple[jax.Array, ...]:
    """Those of the weights of a product."""
    assert pair.sizes is not None
    g_w = _gradient(how, pair.x, pair.g, pair.sizes.astype(jnp.int32))
    return tuple(split(g_w.astype(how.gradient), how.widths))


_grouped_dot = jax.custom_vjp(_product, nondiff_argnums=(0,))
_grouped_dot.defvjp(_grouped_forward, _grouped_backward)
