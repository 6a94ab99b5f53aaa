"""The layers of a stage, of one kind or several, as one tree of stacked parameters.

A leaf is stacked over those layers that have it: of a decoder in which some layers have an MLP and others experts,
"attention/q" holds all layers, "mlp/up" and "moe/up" those of their kind. So a leaf has one name whatever else its
layer holds, and with one kind of layer each leaf holds them all.

The layers run in runs: consecutive layers of one kind, which are scanned.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from models.contract import ModuleDef, Params, Part

Tree = Any
LAYERS = "layers"  # the key of a module's parameters under which the layers are


def runs(layers: Sequence[Part]) -> list[tuple[int, int]]:
    """The ranges of consecutive layers of the same part."""
    starts = [i for i in range(len(layers)) if i == 0 or layers[i] is not layers[i - 1]]
    return list(itertools.pairwise([*starts, len(layers)]))


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


def cut(stacked: Params, layers: Sequence[Part]) -> dict[int, Params]:
    """What each run holds of the stacked parameters, or of some of their leaves. Nothing is copied for a leaf that
    lies in one run alone."""
    return {n: _rows(stacked, [part.logical for part in layers], lo, hi) for n, (lo, hi) in enumerate(runs(layers))}


def _rows(stacked: Mapping, logical: Sequence[Mapping], lo: int, hi: int) -> Params:
    found: Params = {}
    for name, value in stacked.items():
        if name not in logical[lo]:
            continue
        if isinstance(value, Mapping):
            found[name] = _rows(value, [tree.get(name, {}) for tree in logical], lo, hi)
        else:
            start = sum(name in tree for tree in logical[:lo])
            whole = sum(name in tree for tree in logical) == hi - lo
            found[name] = value if whole else value[start : start + hi - lo]
    return found


def join(parts: Sequence[Mapping], leaf: Callable[[list], Any] = jnp.concatenate) -> Params:
    """Nested dicts as one, the inverse of `cut`: `leaf` makes one of what several have at the same path."""
    found: Params = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if isinstance(values[0], Mapping):
            found[name] = join(values, leaf)
        else:
            found[name] = values[0] if len(values) == 1 else leaf(values)
    return found
