"""The layers of a stage, of one kind or several, as one tree of stacked parameters.

A leaf is stacked over those layers that have it: of a decoder in which some layers have an MLP and others experts,
"attention/q" holds all layers, "mlp/up" and "moe/up" those of their kind. So a leaf has one name whatever else its
layer holds, and with one kind of layer each leaf holds them all.

The layers run in runs, which are scanned: a few kinds in turn, again and again. A scan is not given a part of a stack,
it takes each layer's rows from the whole: of the layers A A B A B, the run (lo=1, times=2, period=(A, B)) finds the
first A's row of a leaf that all have at 1 and then at 3.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.contract import ModuleDef, Params, Part

Tree = Any
LAYERS = "layers"  # the key of a module's parameters under which the layers are
LONGEST = 4  # layers of a period: the scan's body has them all, so it costs compile time


class Run(NamedTuple):
    """`times` times the layers of `period`, from layer `lo` of the stage on."""

    lo: int
    times: int
    period: tuple[Part, ...]


class Row(NamedTuple):
    """Where a leaf has the layers of one place of a run's period."""

    first: int
    step: int

    def at(self, i: jax.Array | int) -> jax.Array:
        """The row of repetition `i`."""
        return jnp.int32(self.first + i * self.step)


def runs(layers: Sequence[Part], *, unroll: bool = False) -> list[Run]:
    """The layers as runs, each as long as a period of at most `LONGEST` makes it; with `unroll` each of one layer."""
    if unroll:
        return [Run(i, 1, (part,)) for i, part in enumerate(layers)]
    found: list[Run] = []
    lo = 0
    while lo < len(layers):
        times = {size: _times(layers, lo, size) for size in range(1, LONGEST + 1)}
        size = max(times, key=lambda size: (size * times[size] if times[size] > 1 else 1, -size))
        found.append(Run(lo, times[size], tuple(layers[lo : lo + size])))
        lo += size * times[size]
    return found


def _times(layers: Sequence[Part], lo: int, size: int) -> int:
    """How often the `size` layers from `lo` on come in a row."""
    names = [id(part) for part in layers[lo:]]
    return next(n for n in itertools.count(1) if names[n * size : (n + 1) * size] != names[:size])


def rows(stacked: Mapping, layers: Sequence[Part], run: Run, place: int) -> Params:
    """The `Row` of each leaf that the layers at `place` of the run's period have in `stacked`: in the stacks of all
    `layers`, or in some of them."""
    return _rows(stacked, [part.logical for part in layers], run, place)


def _rows(stacked: Mapping, logical: Sequence[Mapping], run: Run, place: int) -> Params:
    found: Params = {}
    layer = run.lo + place
    for name, value in stacked.items():
        if name not in logical[layer]:
            continue
        if isinstance(value, Mapping):
            found[name] = _rows(value, [tree.get(name, {}) for tree in logical], run, place)
        else:
            has = [name in tree for tree in logical]
            found[name] = Row(sum(has[:layer]), sum(has[run.lo : run.lo + len(run.period)]))
    return found


def take(stacked: Mapping, rows: Mapping, i: jax.Array | int) -> Params:
    """One layer's leaves, that of repetition `i`, from the stacks in which `rows` says where they are."""
    return {
        name: take(stacked[name], row, i)
        if isinstance(row, Mapping)
        else lax.dynamic_index_in_dim(stacked[name], row.at(i), keepdims=False)
        for name, row in rows.items()
    }


def holders(definition: ModuleDef, path: Sequence[str], lo: int, hi: int) -> list[int]:
    """The layers from `lo` to `hi` whose rows the leaf at `path` (without "layers") holds, in this order."""
    return [i for i in range(lo, hi) if _has(definition.layers[i].logical, path)]


def names(path: Sequence[str], layers_of: Callable[[Sequence[str]], Sequence[int]]) -> list[str]:
    """What the rows of the stacked leaf at `path` are called, by the layers of the whole module: those that `layers_of`
    gives for the path behind "layers"."""
    at = list(path).index(LAYERS) + 1
    return ["/".join([*path[:at], f"{layer:04d}", *path[at:]]) for layer in layers_of(path[at:])]


def _has(tree: Any, path: Sequence[str]) -> bool:
    return not path or (isinstance(tree, Mapping) and path[0] in tree and _has(tree[path[0]], path[1:]))


def init(layers: Sequence[Part], keys: jax.Array) -> Params:
    """Initial values of all layers, stacked; `keys` has one for each."""
    starts = [i for i in range(len(layers)) if i == 0 or layers[i] is not layers[i - 1]]
    ranges = itertools.pairwise([*starts, len(layers)])
    return join([jax.vmap(layers[lo].init)(keys[lo:hi]) for lo, hi in ranges])


def join(parts: Sequence[Mapping], leaf: Callable[[list], Any] = jnp.concatenate) -> Params:
    """Nested dicts as one: `leaf` makes one of what several have at the same path."""
    found: Params = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if isinstance(values[0], Mapping):
            found[name] = join(values, leaf)
        else:
            found[name] = values[0] if len(values) == 1 else leaf(values)
    return found
