"""A mixture of experts: each token goes to the few of many small MLPs that a router picks for it.

Routing is that of Mixtral (arXiv:2401.04088) and Qwen3-MoE: logits in at least float32, a softmax over all experts,
the largest `per_token` of them, renormalised or not. Or that of DeepSeek-V3 (arXiv:2412.19437): a sigmoid for each
expert, and a bias that has a say in the choice and none in the weights. No expert has a capacity, so no token is
dropped: tokens are sorted by expert, and a grouped matrix product takes each expert's rows, however many they are.
Beside them there may be a shared expert, to which all tokens go.

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
from models.contract import AUXILIARY, ROUTED, Dims
from models.exchange import exchanged, placed
from models.grouped import grouped_dot, grouped_dots
from models.layers import GatedMlp, check_counts, dot, gated, normal, own, wide
from models.recompute import keeps_arguments
from models.weight import Use, products

# Carry key, of [groups, layers with experts, 2 * experts + 1] sums over tokens: how many went to each expert,
# scores of each, squares of the logits' logsumexp. Each layer appends its row, and the first one falls out.
ROUTING = "routing"
SCORES = ("softmax", "sigmoid")
COUNTED = "counted"  # what layers are given of a batch, [groups, tokens]: how much each token counts; one group


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sizes of the mixtures of experts that take the place of a model's MLPs, and what balances their routers.

    With `selection_bias` each expert has a number that is added to its score where experts are chosen, and nowhere
    else. No gradient moves it: each step adds `bias_rate` where fewer of its tokens than the mean went, and takes it
    away where more did (arXiv:2408.15664). It stays as it is with a rate of 0, or where its path
    ("llm/layers/moe/bias") is frozen.
    """

    count: int  # of experts
    per_token: int  # experts that a token goes to
    width: int  # hidden features of an expert
    renormalise: bool = True  # the weights of a token's experts add up to 1
    dense_layers: tuple[int, ...] = ()  # layers, counted from 0, that keep their MLP
    balance_loss: float = 0.0  # times the load-balancing loss, which is per_token where loads are even
    z_loss: float = 0.0  # times the mean of squared logsumexp of router logits
    scores: str = "softmax"  # over all experts, or "sigmoid": each for itself
    selection_bias: bool = False
    bias_rate: float = 0.0
    groups: int = 1  # equal ones, of experts that stand one behind another
    chosen_groups: int = 1  # a token's experts are of so many, of which the two best choices together are largest
    scale: float = 1.0  # times the weights of a token's experts
    shared_width: int = 0  # hidden features of an expert to which all tokens go; 0: there is none
    shared_gate: bool = False  # times a sigmoid of the token

    def __post_init__(self) -> None:
        check_counts(self, "count", "per_token", "width")
        for name in ("balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Experts.{name}={getattr(self, name)!r}; it must be a finite number, 0 for no loss")
        if self.per_token > self.count:
            raise ValueError(
                f"Experts.per_token={self.per_token} is more than count={self.count}; a token goes to an expert once"
            )
        self._check_router()
        if self.shared_width:
            check_counts(self, "shared_width")
        elif self.shared_gate:
            raise ValueError("Experts.shared_gate is set, and shared_width=0: there is no shared expert; set its width")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    def _check_router(self) -> None:
        if self.scores not in SCORES:
            raise ValueError(f"Experts.scores={self.scores!r}; it must be one of {', '.join(SCORES)}")
        if self.scores == "sigmoid" and self.has_loss:
            name = "balance_loss" if self.balance_loss else "z_loss"
            raise ValueError(
                f"Experts.{name}={getattr(self, name)} is a loss of softmax scores, and scores='sigmoid'; leave it "
                "out, and balance by selection_bias and bias_rate"
            )
        if not 0 <= self.bias_rate < math.inf:
            raise ValueError(f"Experts.bias_rate={self.bias_rate!r}; it must be a finite number, 0 for a fixed bias")
        if self.bias_rate and not self.selection_bias:
            raise ValueError(
                f"Experts.bias_rate={self.bias_rate} moves no bias; set selection_bias=True, or leave it out"
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Experts.scale={self.scale!r}; it must be a finite number above 0")
        check_counts(self, "groups", "chosen_groups")
        if self.groups > 1 and (self.count % self.groups or self.count // self.groups < 2):
            raise ValueError(
                f"Experts.groups={self.groups} does not cut count={self.count} into equal groups of two or more; "
                "change either"
            )
        if self.chosen_groups > self.groups or self.per_token > self.chosen_groups * (self.count // self.groups):
            raise ValueError(
                f"Experts.chosen_groups={self.chosen_groups} of groups={self.groups} must hold the per_token="
                f"{self.per_token} experts of a token, of count={self.count}; change one"
            )

    @property
    def untrained(self) -> "Experts":
        """What the model computes when nothing trains."""
        return dataclasses.replace(self, balance_loss=0.0, z_loss=0.0, bias_rate=0.0)

    @property
    def has_loss(self) -> bool:
        """Whether the routers have a loss of their own."""
        return self.balance_loss > 0 or self.z_loss > 0

    def check_layers(self, num_layers: int, model: str) -> None:
        """Raises ValueError unless `dense_layers` are some, and not all, of the layers of a model of this name."""
        for layer in self.dense_layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_layers:
                raise ValueError(
                    f"Experts.dense_layers names layer {layer!r}; with {model}.num_layers={num_layers} they are 0 to "
                    f"{num_layers - 1}"
                )
        if len(self.dense_layers) == num_layers:
            raise ValueError(
                f"Experts.dense_layers names all {num_layers} layers, so none has experts; leave one out, or set "
                f"{model}.experts to None"
            )


class Declared(NamedTuple):
    """What a model with experts adds to its `ModuleDef`."""

    carry: dict[str, Dims]
    output: dict[str, Dims]
    tp: dict[str, int]  # counts that tp divides
    ep: dict[str, int]
    bias_rate: float


def declare(config: Experts | None) -> Declared:
    """What a model with these experts adds; without any nothing."""
    if config is None:
        return Declared({}, {}, {}, {}, 0.0)
    shared = {"experts.shared_width": config.shared_width} if config.shared_width else {}
    output: dict[str, Dims] = {ROUTED: (None, None)} | ({AUXILIARY: ()} if config.has_loss else {})
    hidden = {"experts.width": config.width} | shared
    return Declared({ROUTING: ("shards", None, None)}, output, hidden, {"experts": config.count}, config.bias_rate)


class Mixture(nnx.Module):
    """SwiGLU experts behind a router. Experts are cut over ep, the hidden features of each over the rest of tp."""

    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        e, d, f = config.count, width, config.width
        self.router = normal(rngs, (d, e), (None, None), d**-0.5)
        if config.selection_bias:
            self.bias = nnx.Param(jnp.zeros((e,), jnp.float32), logical=(None,), balanced=True)
        self.gate = normal(rngs, (e, d, f), ("experts", None, "expert_mlp"), d**-0.5, Use("rows", lead=2))
        self.up = normal(rngs, (e, d, f), ("experts", None, "expert_mlp"), d**-0.5, Use("rows", lead=2))
        self.down = normal(rngs, (e, f, d), ("experts", "expert_mlp", None), f**-0.5, Use("hidden"))
        if config.shared_width:
            self.shared = GatedMlp(d, config.shared_width, rngs=rngs)
        if config.shared_gate:
            self.shared_gate = normal(rngs, (d, 1), (None, None), d**-0.5)

    def __call__(self, x: jax.Array, counted: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        """(the result, the layer's row of `ROUTING` as far as this device's shard of the tokens goes) of `x` [b, s, d]
        of the stream; `counted` as `count_tokens` has it."""
        shared = self._shared(x, axes)
        if axes.sp.names:
            x = axes.etp.gather(x, dim=1)  # what is left of the stream's cut is that of ep
        tokens = x.reshape(-1, x.shape[-1])
        mine = tokens if axes.sp.names else own(tokens, 0, axes.tp_of_ep)
        bias = self.bias.get_value() if self.config.selection_bias else None
        routed = route(mine, self.router.get_value(), bias, self.config)
        sums = tally(routed, counted, self.config)
        for value, *_ in products((self.gate.get_value(), self.up.get_value())):
            mine = vary_like(mine, value)  # here: one all-reduce of the gradient over tp, of tokens, not of copies
        y = exchanged(self._experts, mine, routed.weights, routed.chosen, self.config.count, axes)
        if axes.sp.names:
            return axes.etp.scatter(y.reshape(x.shape), dim=1) + shared, sums
        return axes.tp.psum(placed(y, axes.tp_of_ep).reshape(x.shape) + shared), axes.tp_of_ep.psum(sums)

    def _shared(self, x: jax.Array, axes: Axes) -> jax.Array | float:
        """What the shared expert says of `x`, as the stream has it under sp, else a sum over tp away from whole."""
        if not self.config.shared_width:
            return 0.0
        y = axes.sp.scatter(self.shared.partial(x, axes), dim=1)
        return y * jax.nn.sigmoid(dot(x, self.shared_gate.get_value())) if self.config.shared_gate else y

    def _experts(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows sorted by expert, each through its own; this device's part of the sum over hidden features."""
        last = keeps_arguments(lambda gate, up, w, sizes: grouped_dot(gated(gate, up), w, sizes))
        gate, up = grouped_dots(rows, sizes, self.gate.get_value(), self.up.get_value())
        return last(gate, up, self.down.get_value(), sizes)


class Routed(NamedTuple):
    """What a router says of n tokens: the weights of their experts, the first choice first, and which these are, both
    [n, per_token]; logits and scores of all experts, [n, count]."""

    weights: jax.Array
    chosen: jax.Array
    logits: jax.Array
    scores: jax.Array


def route(tokens: jax.Array, router: jax.Array, bias: jax.Array | None, config: Experts) -> Routed:
    """Where each of `tokens` [n, d] goes; `bias` [count] is added to the scores by which experts are chosen."""
    logits = dot(tokens, router, dtype=wide(tokens.dtype))
    scores = jax.nn.softmax(logits, -1) if config.scores == "softmax" else jax.nn.sigmoid(logits)
    choice = lax.stop_gradient(scores if bias is None else scores + bias[None])
    chosen = lax.top_k(_of_best_groups(choice, config), config.per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, -1)
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20) if config.renormalise else weights
    return Routed(config.scale * weights, chosen, logits, scores)


def _of_best_groups(choice: jax.Array, config: Experts) -> jax.Array:
    """`choice` [n, count] where an expert's group is among the token's best, -inf elsewhere."""
    if config.groups == 1:
        return choice
    grouped = choice.reshape(len(choice), config.groups, -1)
    best = lax.top_k(jnp.sum(lax.top_k(grouped, 2)[0], -1), config.chosen_groups)[1]
    among = jnp.any(jax.nn.one_hot(best, config.groups, dtype=bool), 1)
    return jnp.where(among[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def count_tokens(real: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """How much each token that `Mixture` routes on this device counts, [1, n]: nothing where it is padding, of which
    `real` [b, s] is False, and a share where several devices route it alike: together they count it once."""
    real = real.astype(dtype)
    if axes.sp.names:
        parts = real.reshape(len(real), axes.etp.size, axes.tp_of_ep.size, -1)
        return own(parts, 2, axes.tp_of_ep).reshape(1, -1) / axes.etp.size
    return own(real.reshape(1, -1), 1, axes.tp_of_ep)


def tally(routed: Routed, counted: jax.Array, config: Experts) -> jax.Array:
    """A layer's row of `ROUTING`, [groups, 1, 2 * count + 1]; a gradient reaches what a loss has use for."""
    needed = lambda a, weight: a if weight else lax.stop_gradient(a)
    chosen = jnp.sum(jax.nn.one_hot(routed.chosen, config.count, dtype=counted.dtype), 1)
    squares = jnp.square(jax.nn.logsumexp(needed(routed.logits, config.z_loss), -1, keepdims=True))
    each = chosen, needed(routed.scores, config.balance_loss), squares
    return jnp.concatenate([jnp.sum(counted[:, :, None] * a[None], 1) for a in each], -1)[:, None]


def no_routing(config: Experts, layers: int, x: jax.Array) -> jax.Array:
    """`ROUTING` in front of a module's layers, of which so many have experts, beside its `x`."""
    return vary_like(jnp.zeros((1, layers, 2 * config.count + 1), wide(x.dtype)), x)


def appended(routing: jax.Array, row: jax.Array) -> jax.Array:
    """`ROUTING` behind the layer of which `row` is."""
    return jnp.concatenate([routing[:, 1:], row], 1)


def outcome(routing: jax.Array, config: Experts) -> dict[str, jax.Array]:
    """What a module's output tells of `ROUTING` behind all layers: ROUTED, and AUXILIARY if there is a loss.

    The load-balancing loss is that of Mixtral and Qwen3-MoE in transformers: `count` times the sum over experts of
    (share of tokens that went there, of all layers) times (mean probability, of all layers)."""
    sums = sum_like(routing.sum(0), jnp.zeros(()))
    routed = jnp.round(sums[:, : config.count])  # where several devices counted shares of a token
    if not config.has_loss:
        return {ROUTED: routed}
    rows = jnp.maximum(routed.sum() / config.per_token, 1)  # tokens times layers
    chosen, probabilities, squares = (a / rows for a in jnp.split(sums.sum(0), (config.count, 2 * config.count)))
    balance = config.count * jnp.sum(chosen * probabilities)
    return {ROUTED: routed, AUXILIARY: config.balance_loss * balance + config.z_loss * squares[0]}
