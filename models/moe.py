"""A mixture of experts: each token goes to the few of many small MLPs that a router picks for it.

Routing is that of Mixtral (arXiv:2401.04088) and Qwen3-MoE: logits in at least float32, a softmax over all experts,
the largest `per_token` of them, renormalised or not. No expert has a capacity, so no token is dropped: tokens are
sorted by expert, and a grouped matrix product takes each expert's rows, however many they are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models.axes import Axes, vary_like
from models.layers import check_counts, dot, gated, normal, wide
from models.recompute import keeps_arguments
from models.weight import Use, Weight, in_order, products, split

Kept = tuple[jax.Array, jax.Array, jax.Array]
How = tuple[tuple[int, ...], Any]  # columns of each weight, and the precision of their gradients (None: none is wanted)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sizes of the mixtures of experts that take the place of a decoder's MLPs."""

    count: int  # of experts
    per_token: int  # experts that a token goes to
    width: int  # hidden features of an expert
    renormalise: bool = True  # the weights of a token's experts add up to 1
    dense_layers: tuple[int, ...] = ()  # layers, counted from 0, that keep their MLP

    def __post_init__(self) -> None:
        check_counts(self, "count", "per_token", "width")
        if self.per_token > self.count:
            raise ValueError(
                f"Experts.per_token={self.per_token} is more than count={self.count}; a token goes to an expert once"
            )
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError unless `dense_layers` are some, and not all, of a decoder's layers."""
        for layer in self.dense_layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_layers:
                raise ValueError(
                    f"Experts.dense_layers names layer {layer!r}; with Decoder.num_layers={num_layers} they are 0 to "
                    f"{num_layers - 1}"
                )
        if len(self.dense_layers) == num_layers:
            raise ValueError(
                f"Experts.dense_layers names all {num_layers} layers, so none has experts; leave one out, or set "
                "Decoder.experts to None"
            )


class Mixture(nnx.Module):
    """SwiGLU experts behind a router; each expert's hidden features are cut over tp."""

    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        e, d, f = config.count, width, config.width
        self.router = normal(rngs, (d, e), (None, None), d**-0.5)
        self.gate = normal(rngs, (e, d, f), ("experts", None, "mlp"), d**-0.5, Use("rows", lead=2))
        self.up = normal(rngs, (e, d, f), ("experts", None, "mlp"), d**-0.5, Use("rows", lead=2))
        self.down = normal(rngs, (e, f, d), ("experts", "mlp", None), f**-0.5, Use("hidden"))

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        x = axes.sp.gather(x, dim=1)
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = route(tokens, self.router.get_value(), self.config)
        into, down = (self.gate.get_value(), self.up.get_value()), self.down.get_value()
        for value, *_ in products(into):
            tokens = vary_like(tokens, value)  # here: one all-reduce of the gradient over tp, of tokens, not of copies
        order = jnp.argsort(chosen.reshape(-1)).astype(jnp.int32)
        inverse = jnp.argsort(order).astype(jnp.int32)
        sizes = jnp.sum(jax.nn.one_hot(chosen.reshape(-1), self.config.count, dtype=jnp.int32), 0, dtype=jnp.int32)
        copies = jnp.broadcast_to(tokens[:, None], (*chosen.shape, tokens.shape[1])).reshape(-1, tokens.shape[1])
        rows = permute(copies, order, inverse)
        last = keeps_arguments(lambda gate, up, w, sizes: grouped_dot(gated(gate, up), w, sizes))
        gate, up = grouped_dots(rows, sizes, *into)
        y = permute(last(gate, up, down, sizes), inverse, order).reshape(*chosen.shape, -1)
        y = jnp.sum(y.astype(weights.dtype) * weights[..., None], 1).astype(x.dtype)
        return axes.total(y.reshape(x.shape))


def route(tokens: jax.Array, router: jax.Array, config: Experts) -> tuple[jax.Array, jax.Array]:
    """(weights, experts) of the experts of each of `tokens` [n, d], as [n, per_token]; the largest weight first."""
    logits = dot(tokens, router, dtype=wide(tokens.dtype))
    weights, chosen = lax.top_k(jax.nn.softmax(logits, -1), config.per_token)
    return weights / jnp.sum(weights, -1, keepdims=True) if config.renormalise else weights, chosen


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of `x` in this order. Its gradient is a gather too: autodiff's scatter would add rows one by one."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


def grouped_dot(x: jax.Array, w: jax.Array | Weight, sizes: jax.Array) -> jax.Array:
    """`x` [n, a] times `w` [g, a, b], the first `sizes[0]` rows with `w[0]`, the next `sizes[1]` with `w[1]`, ...

    `sizes` [g] add up to n. Precision is that of `models.layers.dot`.
    """
    (y,) = grouped_dots(x, sizes, w)
    return y


def grouped_dots(x: jax.Array, sizes: jax.Array, *weights: jax.Array | Weight) -> list[jax.Array]:
    """`grouped_dot` of `x` with each of `weights`; in one product where the trainer laid them side by side."""
    found = []
    for value, taps, shapes, places in products(weights):
        x = vary_like(x, value)
        like = functools.partial(vary_like, other=x)
        widths = tuple(shape[-1] for shape in shapes)
        y = _grouped_dot((widths, taps[0].dtype if taps else None), x, like(value), tuple(map(like, taps)), sizes)
        found.append((places, split(y, widths)))
    return in_order(found)


def _product(how: How, x: jax.Array, w: jax.Array, taps: Any, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, w.astype(x.dtype), sizes, preferred_element_type=x.dtype)


def _grouped_forward(how: How, x: jax.Array, w: jax.Array, taps: Any, sizes: jax.Array) -> tuple[jax.Array, Kept]:
    # not through `_grouped_dot`: a checkpoint policy that keeps products would not see this one
    return _product(how, x, w, taps, sizes), (x, w, sizes)


def _grouped_backward(how: How, kept: Kept, g: jax.Array) -> tuple[jax.Array, None, tuple[jax.Array, ...], None]:
    x, w, sizes = kept
    widths, gradient = how
    g = g.astype(x.dtype)
    g_x = _product(how, g, w.swapaxes(1, 2), (), sizes)
    if gradient is None:
        return g_x, None, (), None
    per_group = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    precise = wide(jnp.promote_types(x.dtype, gradient))
    g_w = lax.ragged_dot_general(x, g, sizes, per_group, preferred_element_type=precise).astype(gradient)
    return g_x, None, tuple(split(g_w, widths)), None


_grouped_dot = jax.custom_vjp(_product, nondiff_argnums=(0,))
_grouped_dot.defvjp(_grouped_forward, _grouped_backward)
