"""Pieces that models share: a matrix product with its own gradient, norms, feed-forward blocks, initial values.

Activations are in the compute dtype; parameters stay in theirs (float32) until they meet an activation. Norms and sums
over tokens are computed in at least float32, so that parameters' gradients never pass through a narrower type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models.axes import ABSENT, Axes, Axis, vary_like
from models.contract import Dims
from models.recompute import keeps_arguments
from models.weight import Pair, Use, Weight, in_order, products, split

Kept = tuple[jax.Array, jax.Array]
GROUPED = "grouped_dot"  # the primitive of the product of models/grouped.py
MOST_LAYERS = 10_000  # of a module: their numbers in a checkpoint's names have four digits


def wide(dtype: Any) -> Any:
    """`dtype`, or float32 where that is more precise."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(
    x: jax.Array, w: jax.Array | Weight, *, contract: int = 1, dtype: Any = None, gathers: Axis = ABSENT
) -> jax.Array:
    """`x` times `w` over the last `contract` dims of `x` and the first of `w`, as `dtype` (None: that of `x`).

    Both enter in the precision of `x`. The gradient of `w` leaves in the precision of `w`, or of its tap: autodiff
    would round each microbatch's to that of `x` before it is accumulated. `gathers`: the axis over which the tokens, of
    dim 1 of `x`, are cut, and gathered for the product; the backward is given those of this device, and gathers again.
    """
    (y,) = dots(x, w, contract=contract, dtype=dtype, gathers=gathers)
    return y


def dots(
    x: jax.Array, *weights: jax.Array | Weight, contract: int = 1, dtype: Any = None, gathers: Axis = ABSENT
) -> list[jax.Array]:
    """`dot` of `x` with each of `weights`; in one product where the trainer laid them side by side."""
    found = []
    joint = products(weights)
    if len(joint) > 1:
        x, gathers = gathers.gather(x, dim=1), ABSENT  # once for all
    for product in joint:
        x = vary_like(x, product.value)  # before the first: one all-reduce of the gradient over tp
    for product in joint:
        (value, taps, shapes, places, _), paired = product, product.has_pair
        # Cast out here, all vary over the same axes inside; the transposes of the casts sum the gradients where needed.
        # A pair is no sum, and has what `x` varies over of itself.
        like = functools.partial(vary_like, other=x)
        gradient = taps[0].dtype if taps and not paired else None
        how = How(contract, jnp.dtype(dtype or x.dtype), shapes, gradient, gathers, paired)
        y = _dot(how, x, like(value), taps if paired else tuple(map(like, taps)))
        product.tell(functools.partial(gradients, how), Pair(x, y.astype(x.dtype)))
        trailing = [shape[contract:] for shape in shapes]
        parts = split(y, [math.prod(dims) for dims in trailing])
        rows = tuple(n * gathers.size if dim == 1 else n for dim, n in enumerate(x.shape[: x.ndim - contract]))
        found.append((places, [a.reshape(*rows, *dims) for a, dims in zip(parts, trailing, strict=True)]))
    return in_order(found)


class How(NamedTuple):
    """A product of `dots`: dims that it sums over, precision of the result, shapes of the weights in its array, the
    precision of their gradients, None where none is wanted, the axis over which it gathers tokens, and whether its
    weights have a pair."""

    contract: int
    dtype: Any
    shapes: tuple[tuple[int, ...], ...]
    gradient: Any
    gathers: Axis
    paired: bool = False


def _product(how: How, x: jax.Array, w: jax.Array, taps: Any) -> jax.Array:
    w = _matrix(w, how.contract).astype(x.dtype)
    return jnp.dot(_rows(how, x), w, preferred_element_type=how.dtype)


def _dot_forward(how: How, x: jax.Array, w: jax.Array, taps: Any) -> tuple[jax.Array, Kept]:
    # not through `_dot`: a checkpoint policy that keeps products would not see this one
    return _product(how, x, w, taps), (x, w)


def _dot_backward(how: How, kept: Kept, g: jax.Array) -> tuple[jax.Array, None, tuple[jax.Array | Pair, ...]]:
    x, w = kept
    matrix, g = _matrix(w, how.contract).astype(x.dtype), g.astype(x.dtype)
    g_x = lax.dot_general(g, matrix, (((1,), (1,)), ((), ())))
    if how.gathers.names:
        g_x = how.gathers.scatter(g_x.reshape(x.shape[0], -1, *x.shape[2:]), dim=1)
    g_x = g_x.reshape(x.shape)
    if how.paired:
        return g_x, None, (Pair(x, g),)
    return g_x, None, () if how.gradient is None else gradients(how, Pair(x, g))


def gradients(how: How, pair: Pair) -> tuple[jax.Array, ...]:
    """Those of the weights of a product."""
    x, g, _ = pair
    precise = wide(jnp.promote_types(x.dtype, how.gradient))
    g_w = lax.dot_general(_rows(how, x), g, (((0,), (0,)), ((), ())), preferred_element_type=precise)
    parts = split(g_w.astype(how.gradient), [math.prod(shape[how.contract :]) for shape in how.shapes])
    return tuple(part.reshape(shape) for part, shape in zip(parts, how.shapes, strict=True))


def _rows(how: How, x: jax.Array) -> jax.Array:
    """`x` as [tokens, features]: with more dims a weight's gradient would be a product of transposed copies."""
    return how.gathers.gather(x, dim=1).reshape(-1, math.prod(x.shape[x.ndim - how.contract :]))


def _matrix(w: jax.Array, contract: int) -> jax.Array:
    return w.reshape(math.prod(w.shape[:contract]), -1)


_dot = jax.custom_vjp(_product, nondiff_argnums=(0,))
_dot.defvjp(_dot_forward, _dot_backward)


def is_product(primitive: Any, *arguments: Any, **settings: Any) -> bool:
    """A checkpoint policy: whether this is the product of `dot`, or the grouped one of experts."""
    grouped = primitive.name == GROUPED
    return grouped or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **settings)


def add(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x` plus `bias` along its last dims."""
    total = x.astype(wide(x.dtype))
    return (total + jnp.broadcast_to(bias, x.shape)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x` over its root mean square along the last dim, times `scale`."""
    return keeps_arguments(functools.partial(_rms_norm, eps))(x, scale)


def _rms_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean 0 and variance 1 along the last dim, then a scale and a bias for each feature."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = ones((width,), (None,))
        self.bias = zeros((width,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        norm = keeps_arguments(functools.partial(_layer_norm, self.eps))
        return norm(x, self.scale.get_value(), self.bias.get_value())


def _layer_norm(eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    y = x.astype(wide(x.dtype))
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(scale, y.shape) + jnp.broadcast_to(bias, y.shape)).astype(x.dtype)


@jax.custom_jvp
def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's cumulative at x (Hendrycks and Gimpel, arXiv:1606.08415).

    Its own derivative, because jax 0.12 cannot differentiate `erfc` inside of shard_map: its polynomials meet
    coefficients that do not vary over the mesh.
    """
    return 0.5 * x * lax.erfc(-x * math.sqrt(0.5))


@exact_gelu.defjvp
def _exact_gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return exact_gelu(x), t * (0.5 * lax.erfc(-x * math.sqrt(0.5)) + x * density)


def mlp(
    x: jax.Array,
    up: nnx.Param,
    up_bias: nnx.Param | None,
    down: nnx.Param,
    down_bias: nnx.Param | None,
    *,
    activation: Callable[[jax.Array], jax.Array],
    axes: Axes,
) -> jax.Array:
    """Two linear maps with an activation between; the hidden features are cut over tp."""
    biased = lambda y, bias: y if bias is None else add(y, bias.get_value())
    second = keeps_arguments(lambda hidden, w: dot(activation(hidden), w))
    hidden = biased(dot(x, up.get_value(), gathers=axes.sp), up_bias)
    return biased(axes.total(second(hidden, down.get_value())), down_bias)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`up` times the SiLU of `gate`."""
    return jax.nn.silu(gate) * up


class GatedMlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.gate = normal(rngs, (width, hidden), (None, "mlp"), width**-0.5, Use("x"))
        self.up = normal(rngs, (width, hidden), (None, "mlp"), width**-0.5, Use("x"))
        self.down = normal(rngs, (hidden, width), ("mlp", None), hidden**-0.5, Use("hidden"))

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return axes.total(self.partial(x, axes))

    def partial(self, x: jax.Array, axes: Axes) -> jax.Array:
        """This device's part of the sum over hidden features, of all tokens of `x` along sp."""
        gate, up = dots(x, self.gate.get_value(), self.up.get_value(), gathers=axes.sp)
        down = keeps_arguments(lambda gate, up, w: dot(gated(gate, up), w))
        return down(gate, up, self.down.get_value())


def own(x: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """This device's part of `x`, which has all of them along `dim`."""
    size = x.shape[dim] // axis.size
    return keeps_arguments(lambda x: lax.dynamic_slice_in_dim(x, axis.index() * size, size, dim))(x)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], logical: Dims, std: float, use: Use | None = None) -> nnx.Param:
    """A float32 parameter of independent Gaussians; `logical` names its dims, `use` says that `dot` alone meets it."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), logical=logical, use=use)


def zeros(shape: tuple[int, ...], logical: Dims) -> nnx.Param:
    """A float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical=logical)


def ones(shape: tuple[int, ...], logical: Dims) -> nnx.Param:
    """A float32 parameter of ones."""
    return nnx.Param(jnp.ones(shape, jnp.float32), logical=logical)


def check_counts(config: Any, *names: str) -> None:
    """Raises ValueError unless the fields `names` are whole numbers of at least 1, and layers at most MOST_LAYERS."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value!r}; it must be a whole number of at least 1")
        if name == "num_layers" and value > MOST_LAYERS:
            raise ValueError(f"{type(config).__name__}.{name}={value}; a model has at most {MOST_LAYERS} layers")
