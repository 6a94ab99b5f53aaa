"""Pieces that models share: a matrix product with its own gradient, norms, feed-forward blocks, initial values.

Activations are in the compute dtype; parameters stay in theirs (float32) until they meet an activation. Norms and sums
over tokens are computed in at least float32, so that parameters' gradients never pass through a narrower type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models.axes import Axes, vary_like
from models.contract import Dims
from models.recompute import keeps_arguments

Kept = tuple[jax.Array, jax.Array]
MOST_LAYERS = 10_000  # of a module: their numbers in a checkpoint's names have four digits


def wide(dtype: Any) -> Any:
    """`dtype`, or float32 where that is more precise."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(x: jax.Array, w: jax.Array, *, contract: int = 1, dtype: Any = None) -> jax.Array:
    """`x` times `w` over the last `contract` dims of `x` and the first of `w`, as `dtype` (None: that of `x`).

    Both enter in the precision of `x`. The gradient of `w` leaves in the precision of `w`: autodiff would round each
    microbatch's to that of `x` before it is accumulated.
    """
    # Cast out here, both vary over the same axes inside; the transposes of the casts sum the gradients where needed.
    return _dot(contract, jnp.dtype(dtype or x.dtype), vary_like(x, w), vary_like(w, x))


def _product(contract: int, dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x, w.astype(x.dtype), contract, preferred_element_type=dtype)


def _dot_forward(contract: int, dtype: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Kept]:
    # not through `_dot`: a checkpoint policy that keeps products would not see this one
    return _product(contract, dtype, x, w), (x, w)


def _dot_backward(contract: int, dtype: Any, kept: Kept, g: jax.Array) -> Kept:
    x, w = kept
    g = g.astype(x.dtype)
    rows = tuple(range(x.ndim - contract))
    columns = tuple(range(len(rows), g.ndim)), tuple(range(contract, w.ndim))
    g_x = jnp.tensordot(g, w.astype(x.dtype), columns)
    precise = wide(jnp.promote_types(x.dtype, w.dtype))
    g_w = jnp.tensordot(x, g, (rows, rows), preferred_element_type=precise)
    return g_x, g_w.astype(w.dtype)


_dot = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_dot.defvjp(_dot_forward, _dot_backward)


def is_product(primitive: Any, *arguments: Any, **settings: Any) -> bool:
    """A checkpoint policy: whether this is the product of `dot`, or the grouped one of experts."""
    grouped = primitive.name == "ragged_dot_general"
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
    """Two linear maps with an activation between; the hidden features are cut over tp, the result is whole."""
    biased = lambda y, bias: y if bias is None else add(y, bias.get_value())
    second = keeps_arguments(lambda hidden, w: dot(activation(hidden), w))
    return biased(axes.tp.psum(second(biased(dot(x, up.get_value()), up_bias), down.get_value())), down_bias)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`up` times the SiLU of `gate`."""
    return jax.nn.silu(gate) * up


class GatedMlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.gate = normal(rngs, (width, hidden), (None, "mlp"), width**-0.5)
        self.up = normal(rngs, (width, hidden), (None, "mlp"), width**-0.5)
        self.down = normal(rngs, (hidden, width), ("mlp", None), hidden**-0.5)

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        x = vary_like(x, self.gate.get_value())  # here: one all-reduce of the gradient over tp, not two
        gate, up = dot(x, self.gate.get_value()), dot(x, self.up.get_value())
        down = keeps_arguments(lambda gate, up, w: dot(gated(gate, up), w))
        return axes.tp.psum(down(gate, up, self.down.get_value()))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], logical: Dims, std: float) -> nnx.Param:
    """A float32 parameter of independent Gaussians; `logical` names its dims."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), logical=logical)


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
