"""A mixture of experts: each token goes to the few of many small MLPs that a router picks for it.

Routing is that of Mixtral (arXiv:2401.04088) and Qwen3-MoE: logits in at least float32, a softmax over all experts,
the largest `per_token` of them, renormalised or not. No expert has a capacity, so no token is dropped: tokens are
sorted by expert, and a grouped matrix product takes each expert's rows, however many they are.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models.axes import Axes, vary_like
from models.grouped import grouped_dot, grouped_dots
from models.layers import check_counts, dot, gated, normal, wide
from models.recompute import keeps_arguments
from models.weight import Use, products


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
