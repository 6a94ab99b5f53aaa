"""A weight as the trainer hands it to a model: what enters a product, and the place where its gradient comes out.

The trainer makes, once a step, what its programs multiply with: weights in the precision of the activations, those that
share an input side by side in one array. Such a weight is not differentiated, which would round its gradient to its own
precision. Beside it lies a *tap*, zeros in the precision of the optimizer that nobody reads: the gradient is its
cotangent. Elsewhere (the reference, generation) a weight is an array, and `products` treats both alike.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

STATIC = {"static": True}


class Use(NamedTuple):
    """How a model uses a weight: it only ever multiplies what is called `input` in the weight's module.

    `lead`: dims that weights with the same input share; behind them each has its columns.
    """

    input: str
    lead: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of `shape`: all of `value`, or the columns from `column` on of a `value` [*lead, columns]."""

    value: jax.Array
    tap: jax.Array | None  # None: no gradient is wanted
    shape: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    column: int | None = dataclasses.field(default=None, metadata=STATIC)
    lead: int = dataclasses.field(default=1, metadata=STATIC)

    @property
    def columns(self) -> int:
        """How many it has behind the leading dims."""
        return math.prod(self.shape[self.lead :])


class Product(NamedTuple):
    """What one product takes: `value`, the taps of its weights (none where they have no gradient), and their shapes."""

    value: jax.Array
    taps: tuple[jax.Array, ...]
    shapes: tuple[tuple[int, ...], ...]


def products(weights: Sequence[jax.Array | Weight]) -> list[Product]:
    """The products that multiply one input with all `weights`: one where they lie side by side, else one for each."""
    if _side_by_side(weights):
        taps = tuple(w.tap for w in weights if isinstance(w, Weight) and w.tap is not None)
        return [Product(_value(weights[0]), taps, tuple(w.shape for w in weights))]
    return [_alone(w) for w in weights]


def _side_by_side(weights: Sequence[jax.Array | Weight]) -> bool:
    """Whether the weights are all columns of one array, in order."""
    ends, values = [0], set()
    for w in weights:
        if not isinstance(w, Weight) or w.column != ends[-1]:
            return False
        ends.append(ends[-1] + w.columns)
        values.add(id(w.value))
    return len(values) == 1 and ends[-1] == _value(weights[0]).shape[-1]


def _alone(w: jax.Array | Weight) -> Product:
    if not isinstance(w, Weight):
        return Product(w, (w,), (w.shape,))  # its gradient is that of the array
    value = w.value
    if w.column is not None:
        value = value[..., w.column : w.column + w.columns].reshape(w.shape)
    return Product(value, () if w.tap is None else (w.tap,), (w.shape,))


def _value(w: jax.Array | Weight) -> jax.Array:
    return w.value if isinstance(w, Weight) else w


def split(columns: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """`columns` [..., sum of widths] cut along its last dim."""
    ends = list(itertools.accumulate(widths, initial=0))
    return [columns[..., lo:hi] for lo, hi in itertools.pairwise(ends)]
