"""What a step does with gradients: optax transformations, learning rates, weight decay and freezing by parameter path.

A path is "module/part/.../leaf" ("llm/layers/attention/q"); patterns are those of `fnmatch`, in which * also spans "/".
The learning rate is computed on the host from the global step and multiplied in last: the transformations run at a rate
of 1, so no layout and no skipped step can shift a schedule.
"""

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
NAMES = ("adamw", "sgd", "chain")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Linear warm-up to `learning_rate`, cosine to a fraction of it, one clip by the norm over all modules.

    `chain` names optax transformations that see each element alone (`optax.scale_by_lion`); they give the direction of
    ascent, as `scale_by_*` do, and neither clip nor hold a learning rate.
    """

    name: str = "adamw"  # adamw, sgd or chain
    learning_rate: float = 1e-3  # at the peak
    warmup_steps: int = 0
    decay_steps: int = 0  # step at which the cosine ends, warm-up included; 0: constant after warm-up
    end_learning_rate_fraction: float = 0.0  # of the peak, at the cosine's end
    clip_norm: float | None = 1.0  # None: no clipping
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ("*norm*", "*bias*", "*class*")  # paths that weight decay leaves alone
    momentum: float = 0.0  # sgd
    b1: float = 0.9  # adamw
    b2: float = 0.95  # adamw
    eps: float = 1e-8  # adamw
    frozen: tuple[str, ...] = ()  # paths that do not train ...
    trainable: tuple[str, ...] = ()  # ... except these
    learning_rate_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)  # first match wins
    chain: tuple[optax.GradientTransformation, ...] = ()

    def __post_init__(self) -> None:
        for name in ("no_decay", "frozen", "trainable", "chain"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.name not in NAMES:
            raise ValueError(f"OptimizerConfig.name={self.name!r}; it must be one of {', '.join(NAMES)}")
        if (self.name == "chain") != bool(self.chain):
            raise ValueError(
                f"OptimizerConfig.name={self.name!r} with {len(self.chain)} entries in chain; "
                "name='chain' needs at least one, adamw and sgd take none"
            )
        for name in ("learning_rate", "weight_decay", "warmup_steps", "decay_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"OptimizerConfig.{name}={getattr(self, name)}; it must be finite and not negative")
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"OptimizerConfig.decay_steps={self.decay_steps} ends before warmup_steps={self.warmup_steps}; "
                "decay_steps counts the warm-up in: make it larger, or 0 for a constant rate"
            )
        for name in ("end_learning_rate_fraction", "momentum", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"OptimizerConfig.{name}={getattr(self, name)}; it must be from 0 to 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"OptimizerConfig.clip_norm={self.clip_norm}; it must be positive, or None for no clipping"
            )

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is updated."""
        return _matches(path, self.trainable) or not _matches(path, self.frozen)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _check_elementwise(tx: optax.GradientTransformation) -> None:
    """Raises ValueError if a row's update depends on other rows: its result would depend on the cut into stages."""
    params = jnp.linspace(0.3, -0.7, 16, dtype=jnp.float32).reshape(4, 4)

    def second_update(params: jax.Array) -> jax.Array:
        _, state = tx.update(jnp.sin(params), tx.init(params), params)
        return tx.update(jnp.sin(3 * params), state, params)[0]

    halves = jnp.concatenate([second_update(params[:2]), second_update(params[2:])])
    if not jnp.allclose(second_update(params), halves, rtol=1e-4, atol=1e-6):
        raise ValueError(
            "OptimizerConfig.chain: an entry mixes the elements of a parameter or of several (as norms do), "
            "so its result would depend on the layout; use transformations of single elements, and clip_norm to clip"
        )


def path_of(module: str, path: Sequence[Any]) -> str:
    """A leaf's key path in its module's tree, as the text that patterns match."""
    return "/".join([module, *(str(key.key) for key in path)])


def check(config: OptimizerConfig, paths: Sequence[str], *, apart: Collection[str] = ()) -> None:
    """Raises ValueError for a pattern that matches no parameter, when nothing trains (of those that gradients move, as
    they do not move those `apart`), or for a chain that mixes."""
    if config.chain:
        _check_elementwise(optax.chain(*config.chain))
    settings = {
        "frozen": config.frozen,
        "trainable": config.trainable,
        "learning_rate_multipliers": config.learning_rate_multipliers,
    }
    for setting, patterns in settings.items():
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                near = difflib.get_close_matches(pattern, paths, 1, 0.3)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise ValueError(f"OptimizerConfig.{setting}: {pattern!r} matches no parameter{hint}")
    if not any(config.trains(path) for path in paths if path not in apart):
        raise ValueError(
            f"OptimizerConfig.frozen={list(config.frozen)} freezes every parameter; name what trains in `trainable`"
        )


def split(
    config: OptimizerConfig, module: str, params: Tree, *, apart: Collection[tuple[str, ...]] = ()
) -> tuple[Tree, Tree]:
    """(trainable, frozen) leaves of nested dicts, each without empty dicts; those at the paths `apart`, which no
    gradient moves, are among the frozen ones."""
    trainable: Tree = {}
    frozen: Tree = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        moves = config.trains(path_of(module, path)) and tuple(key.key for key in path) not in apart
        side = trainable if moves else frozen
        for key in path[:-1]:
            side = side.setdefault(key.key, {})
        side[path[-1].key] = leaf
    return trainable, frozen


def merge(over: Tree, under: Tree) -> Tree:
    """Nested dicts joined; a leaf that both have is taken from `over`."""
    joined = dict(under)
    for key, value in over.items():
        joined[key] = merge(value, under.get(key, {})) if isinstance(value, dict) else value
    return joined


def transformation(config: OptimizerConfig, module: str) -> optax.GradientTransformation:
    """The optax chain for a module's trainable parameters, at a learning rate of 1."""

    def decays(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not _matches(path_of(module, path), config.no_decay), params
        )

    decay = [optax.add_decayed_weights(config.weight_decay, decays)] if config.weight_decay else []
    direction = {
        "adamw": lambda: [optax.scale_by_adam(config.b1, config.b2, config.eps)],
        "sgd": lambda: [optax.trace(config.momentum)] if config.momentum else [],
        "chain": lambda: list(config.chain),
    }[config.name]()
    return optax.chain(*direction, *decay, optax.scale(-1.0))


def multipliers(config: OptimizerConfig, module: str, params: Tree) -> Tree:
    """The learning-rate multiplier of every leaf."""

    def find(path: Sequence[Any], _: Any) -> float:
        name = path_of(module, path)
        return next((m for p, m in config.learning_rate_multipliers.items() if fnmatch.fnmatchcase(name, p)), 1.0)

    return jax.tree_util.tree_map_with_path(find, params)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of global step `step`, counted from 0."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if not config.decay_steps:
        return peak
    progress = min(1.0, (step - warmup) / (config.decay_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    end = config.end_learning_rate_fraction
    return peak * (end + (1 - end) * cosine)


def clip_scale(norm: jax.Array, clip_norm: float | None) -> jax.Array:
    """What every gradient is multiplied by so that their global norm is at most `clip_norm`."""
    return jnp.ones_like(norm) if clip_norm is None else jnp.minimum(1.0, clip_norm / (norm + 1e-6)).astype(norm.dtype)


def apply_update(
    tx: optax.GradientTransformation,
    params: Tree,
    state: Tree,
    grads: Tree,
    *,
    learning_rate: jax.Array,
    multipliers: Tree,
    scale: jax.Array,
    ok: jax.Array,
) -> tuple[Tree, Tree]:
    """(parameters, state) after one update with gradients times `scale`; both as they were where `ok` is false."""
    scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    updates, updated = tx.update(scaled, state, params)
    moved = jax.tree.map(lambda p, u, m: p + (learning_rate * m).astype(p.dtype) * u, params, updates, multipliers)
    keep = lambda new, old: jnp.where(ok, new, old)
    return jax.tree.map(keep, moved, params), jax.tree.map(keep, updated, state)
