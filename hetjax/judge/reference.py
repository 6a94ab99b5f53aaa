"""The judge: a whole training step as one pure function on one device.

It shares the models' layer functions with the trainer and nothing else: no stages, no schedule, no boundary, no
sharding, no microbatches (the step is one batch), layers in a Python loop, full logits, its own rate, clip and skip.
"""

import copy
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetjax.core import optimizer
from hetjax.core.graph import Graph, Module
from models.axes import ONE_DEVICE
from models.contract import ModuleDef
from models.moe import COUNTED, ROUTING, Experts
from models.vit import ViT

Tree = Any
BIAS = ("layers", "moe", "bias")  # of routers, which loads move and no gradient


class Result(NamedTuple):
    """One reference step: its loss, gradients before clipping, and what the step left behind; `routed`: of each module
    with experts, how many tokens went to each, by layer."""

    loss: jax.Array
    grads: dict[str, Tree]
    params: dict[str, Tree]
    state: dict[str, Tree]
    routed: Mapping[str, jax.Array]


def whole_batch(graph: Graph, microbatches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The step's microbatches as one batch: item indices are moved to where their microbatch's items now lie."""
    batch = {k: np.concatenate([m[k] for m in microbatches]) for k in microbatches[0]}
    for encoder in graph.encoders:
        key = f"{encoder.name}.index"
        slots = next(microbatches[0][k].shape[0] for k, d in encoder.definition.reads.items() if d[0] == "items")
        shift = slots * encoder.definition.rows
        batch[key] = np.concatenate([np.where(m[key] >= 0, m[key] + i * shift, -1) for i, m in enumerate(microbatches)])
    return batch


def apply_module(definition: ModuleDef, params: Tree, x: Tree, batch: Mapping[str, jax.Array]) -> Tree:
    """A module from its first part to its last, layer by layer."""
    return _end(definition, params, _behind_layers(definition, params, x, batch, 1), batch)


def _behind_layers(
    definition: ModuleDef, params: Tree, x: Tree, batch: Mapping[str, jax.Array], microbatches: int
) -> Tree:
    """The carry behind a module's layers; of so many microbatches each has its own sums of what routers say."""
    carry = dict(definition.first.apply(params["first"], x, batch, ONE_DEVICE))
    seen = dict(definition.prepare(batch, ONE_DEVICE))
    if ROUTING in carry:
        carry[ROUTING] = jnp.repeat(carry[ROUTING], microbatches, 0)
        counted = jnp.eye(microbatches)[:, :, None] * seen[COUNTED].reshape(1, microbatches, -1)
        seen[COUNTED] = counted.reshape(microbatches, -1)
    for i, layer in enumerate(definition.layers):
        entering = {name: x[name] for name in layer.takes}
        carry = layer.apply(layer_params(definition, params["layers"], i), carry | entering, seen, ONE_DEVICE)
    return carry


def _end(definition: ModuleDef, params: Tree, carry: Tree, batch: Mapping[str, jax.Array]) -> Tree:
    last = dict(params["last"]) | {path: params["first"][source] for path, source in definition.tied.items()}
    return definition.last.apply(last, carry, batch, ONE_DEVICE)


def layer_params(definition: ModuleDef, stacked: Tree, i: int) -> Tree:
    """Parameters of layer `i`. A leaf is stacked over the layers that have it."""

    def own(stacked: Tree, layers: list[Tree]) -> Tree:
        if not isinstance(stacked, Mapping):
            return stacked[sum(layer is not None for layer in layers[:i])]
        inside = {name: [(layer or {}).get(name) for layer in layers] for name in stacked}
        return {name: own(value, inside[name]) for name, value in stacked.items() if inside[name][i] is not None}

    return own(stacked, [layer.logical for layer in definition.layers])


def initial_params(graph: Graph, seed: int, dtype: Any) -> dict[str, Tree]:
    """What the parts' own `init` give, one layer after the other: keys are of the seed, the module's name, and a
    layer's index, or 2**20 for the first and 2**20 + 1 for the last part."""
    draw = lambda definition, key: jax.tree.map(lambda a: a.astype(dtype), _initial(definition, key))
    keys = {
        m.name: jax.random.fold_in(jax.random.key(seed), zlib.crc32(m.name.encode()) & 0x7FFFFFFF)
        for m in graph.modules
    }
    return {m.name: jax.jit(functools.partial(draw, m.definition))(keys[m.name]) for m in graph.modules}


def _initial(definition: ModuleDef, key: jax.Array) -> Tree:
    """One module's parameters."""
    first = definition.first.init(jax.random.fold_in(key, 2**20))
    layers = [layer.init(jax.random.fold_in(key, i)) for i, layer in enumerate(definition.layers)]
    last = definition.last.init(jax.random.fold_in(key, 2**20 + 1))
    last = {name: leaf for name, leaf in last.items() if name not in definition.tied}
    parts = {"first": first, "layers": _stacked(layers), "last": last}
    return {part: leaves for part, leaves in parts.items() if leaves}


def _stacked(layers: list[Tree]) -> Tree:
    """One tree of many: a leaf is stacked over the layers that have it."""
    if not isinstance(layers[0], Mapping):
        return jnp.stack(layers)
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {name: _stacked([layer[name] for layer in layers if name in layer]) for name in names}


def mean_loss(graph: Graph, params: dict[str, Tree], batch: Mapping[str, jax.Array]) -> jax.Array:
    """The loss of a batch that is one microbatch."""
    return loss_and_loads(graph, 1, params, batch)[0]


def loss_and_loads(
    graph: Graph, microbatches: int, params: dict[str, Tree], batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(cross-entropy from full logits, summed over target tokens and divided by their number, and the mean of the
    microbatches' router losses; of each module with experts how many tokens went to each, by layer)."""
    edges: dict[str, jax.Array] = {}
    loss: Any = 0.0
    loads: dict[str, jax.Array] = {}
    for module in (*graph.encoders, graph.sink):
        definition, mine = module.definition, params[module.name]
        carry = _behind_layers(definition, mine, edges if module is graph.sink else {}, batch, microbatches)
        y = _end(definition, mine, carry, batch)
        edges |= {module.name if k == "x" else f"{module.name}.{k}": v for k, v in y.items()}
        if ROUTING in carry:
            experts, tokens = definition.config.experts, _tokens(module, batch, microbatches)
            routed, scores, squares = jnp.split(carry[ROUTING], (experts.count, 2 * experts.count), -1)
            loss += jnp.mean(_router_losses(experts, tokens, routed, scores, squares))
            loads[module.name] = routed.sum(0)
    logits = (y["x"] @ y["head"].astype(y["x"].dtype)).astype(jnp.promote_types(y["x"].dtype, jnp.float32))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), batch["targets"][..., None], -1)[..., 0]
    weights = batch["weights"].astype(logits.dtype)
    return loss - (chosen * weights).sum() / jnp.maximum(weights.sum(), 1), loads


def _tokens(module: Module, batch: Mapping[str, jax.Array], microbatches: int) -> jax.Array:
    """How many tokens of each microbatch a module's routers see that are no padding."""
    if isinstance(module.definition.config, ViT):
        return module.definition.config.num_tokens * batch[f"{module.name}.used"].reshape(microbatches, -1).sum(1)
    return (batch["segment_ids"] > 0).reshape(microbatches, -1).sum(1)


def _router_losses(
    experts: Experts, tokens: jax.Array, routed: jax.Array, probabilities: jax.Array, squares: jax.Array
) -> jax.Array:
    """Of each microbatch, with so many `tokens`, from its sums by layer: `routed` and `probabilities` of each expert
    [microbatches, layers, experts], `squares` of logsumexp [microbatches, layers, 1].

    Load balancing as equations 4 to 6 of Switch Transformers (arXiv:2101.03961) over the tokens of all layers, z-loss
    as equation 5 of ST-MoE (arXiv:2202.08906), its mean over them."""
    seen = jnp.maximum(tokens * routed.shape[1], 1)[:, None]
    fractions, means = routed.sum(1) / seen, probabilities.sum(1) / seen
    balance = experts.count * jnp.einsum("me,me->m", fractions, means)
    return experts.balance_loss * balance + experts.z_loss * (squares.sum(1) / seen)[:, 0]


def learning_rate(config: optimizer.OptimizerConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine to the end fraction: written out again, to judge the trainer's."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay_steps == 0:
        return config.learning_rate
    progress = min((step - config.warmup_steps) / max(config.decay_steps - config.warmup_steps, 1), 1.0)
    floor = config.end_learning_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress))))


class Reference:
    """Trains `graph` on one device, in the precision of its parameters."""

    def __init__(self, graph: Graph, config: optimizer.OptimizerConfig) -> None:
        self.graph, self.config = graph, config
        self._grad = jax.jit(
            jax.value_and_grad(functools.partial(loss_and_loads, graph), argnums=1, has_aux=True), static_argnums=0
        )
        self._move = jax.jit(self._moved)  # whole: op by op a GPU compiles hundreds of programs

    def with_config(self, config: optimizer.OptimizerConfig) -> "Reference":
        """The reference of another optimizer for the same model; nothing of the model compiles again."""
        other = copy.copy(self)
        other.config = config
        other._move = jax.jit(other._moved)
        return other

    def split(self, params: dict[str, Tree]) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """(trainable, frozen) parameters by module."""
        both = {name: optimizer.split(self.config, name, tree, apart=[BIAS]) for name, tree in params.items()}
        return {n: b[0] for n, b in both.items()}, {n: b[1] for n, b in both.items()}

    def init_state(self, params: dict[str, Tree]) -> dict[str, Tree]:
        """The optimizer's state before the first step."""
        return {n: self._tx(n).init(tree) for n, tree in self.split(params)[0].items()}

    def _tx(self, name: str) -> optax.GradientTransformation:
        return optimizer.transformation(self.config, name)

    def step(
        self,
        params: dict[str, Tree],
        state: dict[str, Tree],
        microbatches: Sequence[Mapping[str, np.ndarray]],
        step: int,
    ) -> Result:
        """One training step over all microbatches."""
        (loss, routed), grads = self._grad(len(microbatches), params, whole_batch(self.graph, microbatches))
        return self.update(params, state, loss, self.split(grads)[0], routed, step)

    def update(
        self,
        params: dict[str, Tree],
        state: dict[str, Tree],
        loss: jax.Array,
        grads: dict[str, Tree],
        routed: Mapping[str, jax.Array],
        step: int,
    ) -> Result:
        """What a step makes of its loss, gradients (of trainable parameters) and loads of experts; of NaN and infinity
        nothing."""
        trainable, frozen = self.split(params)
        norm = _norm(grads)
        if not bool(jnp.isfinite(norm) & jnp.isfinite(loss)):
            return Result(loss, grads, params, state, routed)
        clip = self.config.clip_norm
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        moved, new_state = self._move(trainable, state, grads, factor, learning_rate(self.config, step))
        new_params = {name: optimizer.merge(moved[name], self._balanced(name, frozen[name], routed)) for name in moved}
        return Result(loss, grads, new_params, new_state, routed)

    def _balanced(self, name: str, frozen: Tree, routed: Mapping[str, jax.Array]) -> Tree:
        """A module's leaves that no gradient moves, with its selection biases as algorithm 1 of arXiv:2408.15664 leaves
        them: by the sign of what an expert's load lacks of the mean."""
        experts = getattr(self.graph.module(name).definition.config, "experts", None)
        if experts is None or not experts.bias_rate or not self.config.trains("/".join((name, *BIAS))):
            return frozen
        layers, moe, leaf = BIAS
        lacking = np.asarray(routed[name]).mean(1, keepdims=True) - np.asarray(routed[name])
        bias = frozen[layers][moe][leaf] + experts.bias_rate * np.sign(lacking)
        return optimizer.merge({layers: {moe: {leaf: bias.astype(frozen[layers][moe][leaf].dtype)}}}, frozen)

    def _moved(
        self, trainable: dict[str, Tree], state: dict[str, Tree], grads: dict[str, Tree], factor: float, rate: float
    ) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """(parameters, state) after a step with gradients times `factor`."""
        moved, new_state = {}, {}
        for name, tree in trainable.items():
            clipped = jax.tree.map(lambda g: g * factor, grads[name])
            updates, new_state[name] = self._tx(name).update(clipped, state[name], tree)
            multipliers = optimizer.multipliers(self.config, name, tree)
            moved[name] = jax.tree.map(lambda p, u, m: p + rate * m * u, tree, updates, multipliers)
        return moved, new_state


@jax.jit
def _norm(grads: dict[str, Tree]) -> jax.Array:
    """Of all gradients together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
