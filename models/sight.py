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
    """

    positions: jax.Array  # [b, q]
    segments: jax.Array  # [b, q]
    key_positions: jax.Array  # [b, k]
    key_segments: jax.Array  # [b, k]
    causal: bool = dataclasses.field(default=True, metadata=STATIC)
    window: int | None = dataclasses.field(default=None, metadata=STATIC)
    ordered: bool = dataclasses.field(default=False, metadata=STATIC)

    def mask(self) -> jax.Array:
        """Whether a query sees a key, [b, q, k]."""
        seen = (self.segments[:, :, None] == self.key_segments[:, None, :]) & (self.segments[:, :, None] > 0)
        behind = self.positions[:, :, None] - self.key_positions[:, None, :]
        if self.causal:
            seen &= behind >= 0
        return seen if self.window is None else seen & (behind < self.window)

    def overlaps(self) -> jax.Array:
        """False where no query can see any key; True where one may, going by the ends of their ranges alone."""
        q, k = _ends(self.positions, self.segments), _ends(self.key_positions, self.key_segments)
        may = (q.last_segment >= k.first_segment) & (k.last_segment >= q.first_segment)
        if self.causal:
            may &= q.last >= k.first
        if self.window is not None:
            may &= q.first - k.last < self.window
        return may.any()


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


def everywhere(q: jax.Array, k: jax.Array) -> Sight:
    """Every query of `q` [b, q, ...] sees every key of `k` [b, k, ...]."""
    positions, key_positions = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    return Sight(positions, positions + 1, key_positions, key_positions + 1, causal=False)
