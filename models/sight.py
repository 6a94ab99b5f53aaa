"""Who may look at whom: the one rule of attention for packing, padding, causality and windows.

Packed rows hold several documents (segments 1, 2, ...) and padding (segment 0). Positions start again in each
segment, so "same segment, and not later" needs no order of the tokens: a sequence that is cut and permuted over cp
(zig-zag), or a single query against stored keys, is the same rule.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """A query sees a key of its own segment, if that is not 0; if `causal`, at no later position; if there is a
    `window`, less than that many positions back. Padding sees nothing, and attention yields 0 there.

    `ordered` promises more: queries and keys are the same tokens, and each row is one document in order with padding
    behind it. A kernel may then go by the order alone; padding sees something too, and yields finite values.

    `zigzag` promises less: documents stand one behind another in a row, padding behind them, and the keys are those of
    whole rows in the zig-zag order of that many devices. 1 is in order; where there are as many queries, they are then
    the same tokens. What a query sees is then a range of the keys in order, and `ranges` has the ends, if asked for.
    """

    positions: jax.Array  # [b, q]
    segments: jax.Array  # [b, q]
    key_positions: jax.Array  # [b, k]
    key_segments: jax.Array  # [b, k]
    causal: bool = dataclasses.field(default=True, metadata=STATIC)
    window: int | None = dataclasses.field(default=None, metadata=STATIC)
    ordered: bool = dataclasses.field(default=False, metadata=STATIC)
    zigzag: int | None = dataclasses.field(default=None, metadata=STATIC)
    ranges: "Ranges | None" = None

    def mask(self) -> jax.Array:
        """Whether a query sees a key, [b, q, k]."""
        seen = (self.segments[:, :, None] == self.key_segments[:, None, :]) & (self.segments[:, :, None] > 0)
        behind = self.positions[:, :, None] - self.key_positions[:, None, :]
        if self.causal:
            seen &= behind >= 0
        return seen if self.window is None else seen & (behind < self.window)

    def ranged(self) -> "Sight":
        """The same with `ranges`; needs `zigzag`."""
        assert self.zigzag is not None
        positions, segments = (in_order(x, self.zigzag) for x in (self.key_positions, self.key_segments))
        mask = dataclasses.replace(self, key_positions=positions, key_segments=segments).mask()
        number, count = jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape[-1]
        first, end = jnp.where(mask, number, count).min(-1), jnp.where(mask, number + 1, 0).max(-1)
        return dataclasses.replace(self, ranges=Ranges(first, end))

    def overlaps(self) -> jax.Array:
        """False where no query can see any key; True where one may, going by the ends of their ranges alone."""
        q, k = _ends(self.positions, self.segments), _ends(self.key_positions, self.key_segments)
        may = (q.last_segment >= k.first_segment) & (k.last_segment >= q.first_segment)
        if self.causal:
            may &= q.last >= k.first
        if self.window is not None:
            may &= q.first - k.last < self.window
        return may.any()


class Ranges(NamedTuple):
    """The keys that each query sees: from `first` on, before `end`, [b, q]; where it sees none, `end` is 0 and `first`
    is behind all keys."""

    first: jax.Array
    end: jax.Array


def in_order(x: jax.Array, devices: int) -> jax.Array:
    """Keys [b, k, ...] gathered in the zig-zag order of cp: device r brings chunks r and 2 devices - 1 - r."""
    if devices == 1:
        return x
    chunks = x.reshape(x.shape[0], devices, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], 1).reshape(x.shape)


def in_zigzag(x: jax.Array, devices: int) -> jax.Array:
    """The inverse of `in_order`."""
    chunks = x.reshape(x.shape[0], 2, devices, -1, *x.shape[2:])
    return jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], 2).reshape(x.shape)


class _Ends(NamedTuple):
    """The smallest and largest position and segment of each row's tokens, [b]; of padding alone, an empty range."""

    first: jax.Array
    last: jax.Array
    first_segment: jax.Array
    last_segment: jax.Array


def _ends(positions: jax.Array, segments: jax.Array) -> _Ends:
    far, real = jnp.iinfo(jnp.int32).max, segments > 0
    return _Ends(
        jnp.where(real, positions, far).min(1),
        jnp.where(real, positions, 0).max(1),
        jnp.where(real, segments, far).min(1),
        segments.max(1),
    )


def everywhere(q: jax.Array, k: jax.Array | jax.ShapeDtypeStruct) -> Sight:
    """Every query of `q` [b, q, ...] sees every key of `k` [b, k, ...]."""
    positions, key_positions = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    return Sight(positions, positions + 1, key_positions, key_positions + 1, causal=False)
