"""A weight as the trainer hands it to a model: what enters a product, and the place where its gradient comes out.

The trainer makes, once a step, what its programs multiply with: weights in the precision of the activations, those that
share an input side by side in one array. Such a weight is not differentiated, which would round its gradient to its own
precision. Beside it lies a *tap*, zeros in the precision of the optimizer that nobody reads: the gradient is its
cotangent. Elsewhere (the reference, generation) a weight is an array, and `products` treats both alike.

Where another program is to make the gradients, a *pair* lies in place of the taps of all weights of a product: zeros
like the product's input and its output. Their cotangents are that input and the output's cotangent, of which the
gradients are the product.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from models.axes import program_device
from models.paths import Path

STATIC = {"static": True}


class Use(NamedTuple):
    """How a model uses a weight: it only ever multiplies what is called `input` in the weight's module.

    `lead`: dims that weights with the same input share; behind them each has its columns.
    """

    input: str
    lead: int = 1


class Pair(NamedTuple):
    """Of a product the input, and the output's cotangent; of a grouped one the rows of each group, as floating-point
    numbers, which alone have cotangents."""

    x: jax.Array
    g: jax.Array
    sizes: jax.Array | None = None


Make = Callable[[Pair], Sequence[jax.Array]]  # gradients of the weights of a product, in the order of their columns
Tell = Callable[[tuple[Path, ...], Make, Pair], None]  # of the weights at these paths, and something like their pair


class Told(NamedTuple):
    """Who hears of a product that takes the weight at `path`."""

    path: Path
    tell: Tell


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of `shape`: all of `value`, or the columns from `column` on of a `value` [*lead, columns].

    `tap`: an array, or None where no gradient is wanted; of the weights of one product the first may have a pair, and
    then no other has a tap. `told`: who hears of the product."""

    value: jax.Array
    tap: Any
    shape: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    column: int | None = dataclasses.field(default=None, metadata=STATIC)
    lead: int = dataclasses.field(default=1, metadata=STATIC)
    told: Told | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def columns(self) -> int:
        """How many it has behind the leading dims."""
        return math.prod(self.shape[self.lead :])


class Product(NamedTuple):
    """What one product takes: `value`, the taps of its weights (none where they have no gradient) or their pair, and
    their shapes.

    `places`: which of the weights that were asked for they are, in the order of their columns. `told`: who hears of
    it, by weight."""

    value: jax.Array
    taps: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    told: tuple[Told, ...] = ()

    @property
    def has_pair(self) -> bool:
        """Whether a pair is in place of its taps."""
        return any(isinstance(tap, Pair) for tap in self.taps)

    def tell(self, make: Make, like: Pair) -> None:
        """Says how the gradients come of a pair, and what that is like, if anybody wants to hear."""
        if self.told:
            self.told[0].tell(tuple(told.path for told in self.told), make, like)


def products(weights: Sequence[jax.Array | Weight]) -> list[Product]:
    """The products that multiply one input with all `weights`: one where they lie side by side, else one for each."""
    columns = [w.column for w in weights if isinstance(w, Weight) and w.column is not None]
    if len(columns) < len(weights):
        return [_alone(w, place) for place, w in enumerate(weights)]
    order = tuple(sorted(range(len(weights)), key=columns.__getitem__))
    beside = [w for w in (weights[place] for place in order) if isinstance(w, Weight)]
    if len({id(w.value) for w in beside}) > 1 or sum(w.columns for w in beside) < beside[0].value.shape[-1]:
        return [_alone(w, place) for place, w in enumerate(weights)]
    taps = tuple(w.tap for w in beside if w.tap is not None)
    told = tuple(w.told for w in beside if w.told is not None)
    return [Product(beside[0].value, taps, tuple(w.shape for w in beside), order, told)]


def _alone(w: jax.Array | Weight, place: int) -> Product:
    if not isinstance(w, Weight):
        return Product(w, (w,), (w.shape,), (place,))  # its gradient is that of the array
    value = w.value
    if w.column is not None:
        value = value[..., w.column : w.column + w.columns].reshape(w.shape)
    told = () if w.told is None else (w.told,)
    return Product(value, () if w.tap is None else (w.tap,), (w.shape,), (place,), told)


def in_order(found: Iterable[tuple[tuple[int, ...], Sequence[jax.Array]]]) -> list[jax.Array]:
    """What was asked for, of the (places, results) of all products."""
    pairs = [pair for places, results in found for pair in zip(places, results, strict=True)]
    return [result for _, result in sorted(pairs, key=lambda pair: pair[0])]


def split(columns: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """`columns` [..., sum of widths] cut along its last dim."""
    if program_device().platform == "cpu":
        return list(lax.split(columns, widths, axis=-1))  # its gradients are written side by side, not padded and added
    # Elsewhere padding is fused with what makes the gradients, while nothing fuses into `lax.split`'s concatenation (a
    # described H100's 1B step: 0.944 and 0.959 s).
    ends = list(itertools.accumulate(widths, initial=0))
    return [columns[..., lo:hi] for lo, hi in itertools.pairwise(ends)]
