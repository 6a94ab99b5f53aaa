"""Generation on one device's shards: a prompt becomes a memory of keys and values, a token extends it.

Prompts stand at the left of their rows, padded behind. All rows write a new token into the same slot; who sees whom is
told by positions and segments alone (models/attention.py), so the padding in between is never looked at.
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hetjax.core import stacks
from hetjax.core.loss import masked
from models.axes import Axes
from models.contract import ModuleDef, Params
from models.layers import dot, wide

Tree = Any
Arrays = Mapping[str, jax.Array]


class Memory(NamedTuple):
    """What is remembered of the tokens so far: arrays, or their specs."""

    layers: Tree  # of each run of layers, by place of its period: key -> [repetitions, b, slots, ...]
    positions: Any  # [b, slots]
    segments: Any  # [b, slots]; 0 where nothing is remembered
    recalled: Any  # what of encoders new tokens meet too, and where its items stand: name -> rows, or index [b, slots]


def run_layers(
    definition: ModuleDef,
    params: Params,
    carry: Tree,
    batch: Arrays,
    axes: Axes,
    caches: Sequence[Tree] | None = None,
    entering: Arrays = types.MappingProxyType({}),
) -> tuple[Tree, list[Tree]]:
    """(carry, caches) behind all layers. `caches` has one for each place of each run's period (hetjax/core/stacks.py);
    None: none is kept. `entering`: what of encoders meets the batch."""
    kept = []
    seen, stacked = definition.prepare(batch, axes), params[stacks.LAYERS]
    for number, run in enumerate(stacks.runs(definition.layers)):

        def body(carry: Tree, inputs: tuple[jax.Array, Tree], run: stacks.Run = run) -> tuple[Tree, list[Tree]]:
            i, caches = inputs
            made = []
            for place, part in enumerate(run.period):
                weights = stacks.take(stacked, stacks.rows(stacked, definition.layers, run, place), i)
                taken = {name: entering[name] for name in part.takes if name in entering}
                cache = {} if caches is None else {"cache": caches[place]}
                out = part.apply(weights, {**carry, **cache, **taken}, seen, axes)
                made.append(out.get("cache"))
                carry = {k: out[k] for k in carry}
            return carry, made

        repetitions = jnp.arange(run.times, dtype=jnp.int32)
        carry, cache = lax.scan(body, carry, (repetitions, None if caches is None else caches[number]))
        kept.append(cache)
    return carry, kept


def encode(definition: ModuleDef, params: Params, batch: Arrays, axes: Axes) -> Tree:
    """The output of an encoder."""
    carry = definition.first.apply(params["first"], {}, batch, axes)
    carry, _ = run_layers(definition, params, carry, batch, axes)
    return definition.last.apply(params["last"], carry, batch, axes)


def prefill(
    definition: ModuleDef, params: Params, rows: Arrays, batch: Arrays, axes: Axes, room: int
) -> tuple[jax.Array, Memory]:
    """(logits behind each prompt [b, v / tp], memory with `room` free slots).

    `batch` as in training, without targets; "lengths" [b] are the tokens of each prompt. `rows`: encoders' outputs.
    """
    carry = definition.first.apply(params["first"], rows, batch, axes)
    nothing: list[list[Tree]] = [[{}] * len(run.period) for run in stacks.runs(definition.layers)]
    carry, caches = run_layers(definition, params, carry, batch, axes, nothing, rows)
    last = (batch["lengths"] - 1)[:, None]
    take = lambda x: jnp.take_along_axis(x, last.reshape(*last.shape, *[1] * (x.ndim - 2)), 1)
    ends = {k: take(x) if "stream" in definition.carry[k] else x for k, x in carry.items()}
    pad = lambda x, dim: jnp.pad(x, [(0, room * (i == dim)) for i in range(x.ndim)])
    segments = (batch["segment_ids"] > 0).astype(jnp.int32)
    recalled = {name: rows[name] for name in definition.recalls}
    recalled |= {key: jnp.pad(batch[key], ((0, 0), (0, room)), constant_values=-1) for key in indices(definition)}
    caches = jax.tree.map(lambda x: pad(x, 2), caches)
    memory = Memory(caches, pad(batch["positions"], 1), pad(segments, 1), recalled)
    return _logits(definition, params, ends, batch, axes), memory


def step(
    definition: ModuleDef,
    params: Params,
    memory: Memory,
    tokens: jax.Array,
    positions: jax.Array,
    slot: jax.Array,
    axes: Axes,
) -> tuple[jax.Array, Memory]:
    """(logits behind `tokens` [b, v / tp], memory with them in `slot`). `tokens` and their `positions` are [b]."""
    put = lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new[:, None], slot, 1)
    ones = jnp.ones_like(positions)
    memory = memory._replace(positions=put(memory.positions, positions), segments=put(memory.segments, ones))
    batch = {"tokens": tokens[:, None], "positions": positions[:, None], "segment_ids": ones[:, None]}
    batch |= {"cache.slot": slot, "cache.positions": memory.positions, "cache.segment_ids": memory.segments}
    batch |= {key: memory.recalled[key] for key in indices(definition)}
    carry = definition.first.apply(params["first"], {}, batch, axes)
    carry, caches = run_layers(definition, params, carry, batch, axes, memory.layers, memory.recalled)
    return _logits(definition, params, carry, batch, axes), memory._replace(layers=caches)


def indices(definition: ModuleDef) -> list[str]:
    """What of a batch tells where items stand that new tokens meet."""
    return [f"{name}.index" for name in definition.recalls]


def _logits(definition: ModuleDef, params: Params, carry: Tree, batch: Arrays, axes: Axes) -> jax.Array:
    y = definition.last.apply(params["last"], carry, batch, axes)
    return masked(dot(y["x"][:, 0], y["head"], dtype=wide(y["x"].dtype)), definition.vocab, axes)
