"""A mixture of experts: each token goes to the few of many small MLPs that a router picks for it.

Routing is that of Mixtral (arXiv:2401.04088) and Qwen3-MoE: logits in at least float32, a softmax over all experts,
the largest `per_token` of them, renormalised or not. No expert has a capacity, so no token is dropped: tokens are
sorted by expert, and a grouped matrix product takes each expert's rows, however many they are.

What the losses of routers and their statistics need are sums over tokens, which travel from layer to layer (`ROUTING`)
and become whole in the last part: both losses are those of a global microbatch and of all layers with experts together.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models.axes import Axes, sum_like, vary_like
from models.contract import AUXILIARY, ROUTED
from models.exchange import exchanged, placed
from models.grouped import grouped_dot, grouped_dots
from models.layers import check_counts, dot, gated, normal, own, wide
from models.recompute import keeps_arguments
from models.weight import Use, products

# Carry key, of [groups, layers with experts, 2 * experts + 1] sums over tokens: how many went to each expert,
# probabilities of each, squares of the logits' logsumexp. Each layer appends its row, and the first one falls out.
ROUTING = "routing"
COUNTED = "counted"  # what layers are given of a batch, [groups, tokens]: how much each token counts; one group


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sizes of the mixtures of experts that take the place of a decoder's MLPs, and losses of their routers."""

    count: int  # of experts
    per_token: int  # experts that a token goes to
    width: int  # hidden features of an expert
    renormalise: bool = True  # the weights of a token's experts add up to 1
    dense_layers: tuple[int, ...] = ()  # layers, counted from 0, that keep their MLP
    balance_loss: float = 0.0  # times the load-balancing loss, which is per_token where loads are even
    z_loss: float = 0.0  # times the mean of squared logsumexp of router logits

    def __post_init__(self) -> None:
        check_counts(self, "count", "per_token", "width")
        for name in ("balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Experts.{name}={getattr(self, name)!r}; it must be a finite number, 0 for no loss")
        if self.per_token > self.count:
            raise ValueError(
                f"Experts.per_token={self.per_token} is more than count={self.count}; a token goes to an expert once"
            )
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    @property
    def without_losses(self) -> "Experts":
        """What the model computes when nothing trains."""
        return dataclasses.replace(self, balance_loss=0.0, z_loss=0.0)

    @property
    def has_loss(self) -> bool:
        """Whether the routers have a loss of their own."""
        return self.balance_loss > 0 or self.z_loss > 0

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
    """SwiGLU experts behind a router. Experts are cut over ep, the hidden features of each over the rest of tp."""

    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        e, d, f = config.count, width, config.width
        self.router = normal(rngs, (d, e), (None, None), d**-0.5)
        self.gate = normal(rngs, (e, d, f), ("experts", None, "expert_mlp"), d**-0.5, Use("rows", lead=2))
        self.up = normal(rngs, (e, d, f), ("experts", None, "expert_mlp"), d**-0.5, Use("rows", lead=2))
        self.down = normal(rngs, (e, f, d), ("experts", "expert_mlp", None), f**-0.5, Use("hidden"))

    def __call__(self, x: jax.Array, counted: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        """(the result, the layer's row of `ROUTING` as far as this device's shard of the tokens goes) of `x` [b, s, d]
        of the stream; `counted` as `count_tokens` has it."""
        if axes.sp.names:
            x = axes.etp.gather(x, dim=1)  # what is left of the stream's cut is that of ep
        tokens = x.reshape(-1, x.shape[-1])
        mine = tokens if axes.sp.names else own(tokens, 0, axes.tp_of_ep)
        routed = route(mine, self.router.get_value(), self.config)
        sums = tally(routed, counted, self.config)
        for value, *_ in products((self.gate.get_value(), self.up.get_value())):
            mine = vary_like(mine, value)  # here: one all-reduce of the gradient over tp, of tokens, not of copies
        y = exchanged(self._experts, mine, routed.weights, routed.chosen, self.config.count, axes)
        if axes.sp.names:
            return axes.etp.scatter(y.reshape(x.shape), dim=1), sums
        return axes.tp.psum(placed(y, axes.tp_of_ep)).reshape(x.shape), axes.tp_of_ep.psum(sums)

    def _experts(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows sorted by expert, each through its own; this device's part of the sum over hidden features."""
        last = keeps_arguments(lambda gate, up, w, sizes: grouped_dot(gated(gate, up), w, sizes))
        gate, up = grouped_dots(rows, sizes, self.gate.get_value(), self.up.get_value())
        return last(gate, up, self.down.get_value(), sizes)


class Routed(NamedTuple):
    """What a router says of n tokens: the weights of their experts, the largest first, and which these are, both
    [n, per_token]; logits and probabilities of all experts, [n, count]."""

    weights: jax.Array
    chosen: jax.Array
    logits: jax.Array
    probabilities: jax.Array


def route(tokens: jax.Array, router: jax.Array, config: Experts) -> Routed:
    """Where each of `tokens` [n, d] goes."""
    logits = dot(tokens, router, dtype=wide(tokens.dtype))
    probabilities = jax.nn.softmax(logits, -1)
    weights, chosen = lax.top_k(probabilities, config.per_token)
    weights = weights / jnp.sum(weights, -1, keepdims=True) if config.renormalise else weights
    return Routed(weights, chosen, logits, probabilities)


def count_tokens(segments: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """How much each token that `Mixture` routes on this device counts, [1, n]: nothing where it is padding, of which
    `segments` [b, s] are 0, and a share where several devices route it alike: together they count it once."""
    real = (segments > 0).astype(dtype)
    if axes.sp.names:
        parts = real.reshape(len(real), axes.etp.size, axes.tp_of_ep.size, -1)
        return own(parts, 2, axes.tp_of_ep).reshape(1, -1) / axes.etp.size
    return own(real.reshape(1, -1), 1, axes.tp_of_ep)


def tally(routed: Routed, counted: jax.Array, config: Experts) -> jax.Array:
    """A layer's row of `ROUTING`, [groups, 1, 2 * count + 1]; a gradient reaches what a loss has use for."""
    needed = lambda a, weight: a if weight else lax.stop_gradient(a)
    chosen = jnp.sum(jax.nn.one_hot(routed.chosen, config.count, dtype=counted.dtype), 1)
    squares = jnp.square(jax.nn.logsumexp(needed(routed.logits, config.z_loss), -1, keepdims=True))
    each = chosen, needed(routed.probabilities, config.balance_loss), squares
    return jnp.concatenate([jnp.sum(counted[:, :, None] * a[None], 1) for a in each], -1)[:, None]


def no_routing(config: Experts, layers: int, x: jax.Array) -> jax.Array:
    """`ROUTING` in front of a module's layers, of which so many have experts, beside its `x`."""
    return vary_like(jnp.zeros((1, layers, 2 * config.count + 1), wide(x.dtype)), x)


def appended(routing: jax.Array, row: jax.Array) -> jax.Array:
    """`ROUTING` behind the layer of which `row` is."""
    return jnp.concatenate([routing[:, 1:], row], 1)


def outcome(routing: jax.Array, config: Experts) -> dict[str, jax.Array]:
    """What a language model's output tells of `ROUTING` behind all layers: ROUTED, and AUXILIARY if there is a loss.

    The load-balancing loss is that of Mixtral and Qwen3-MoE in transformers: `count` times the sum over experts of
    (share of tokens that went there, of all layers) times (mean probability, of all layers)."""
    sums = sum_like(routing.sum(0), jnp.zeros(()))
    routed = sums[:, : config.count]
    if not config.has_loss:
        return {ROUTED: routed}
    rows = jnp.maximum(routed.sum() / config.per_token, 1)  # tokens times layers
    chosen, probabilities, squares = (a / rows for a in jnp.split(sums.sum(0), (config.count, 2 * config.count)))
    balance = config.count * jnp.sum(chosen * probabilities)
    return {ROUTED: routed, AUXILIARY: config.balance_loss * balance + config.z_loss * squares[0]}
