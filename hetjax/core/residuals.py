"""A VJP that crosses from the forward program to the backward program without a copy of anything both are given.

`jax.vjp` returns a pytree of residuals. Those that ARE inputs of the program (weights, frozen weights, activations that
came in, pixels) are recognised by identity at trace time and left out: the backward program is given the same inputs
and puts them back. What remains leaves the shard_map with a leading dim over exactly the axes that it varies over;
fewer or more would change its type and the transposed program would not type-check.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from models.axes import varying_axes

Tree = Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to rebuild a VJP: its tree, and for each leaf the input that it is, or the axes of a residual."""

    tree: Any
    leaves: tuple[int | tuple[str, ...], ...]


def take_apart(
    pull: Callable[..., Tree], inputs: Sequence[jax.Array], axis_names: Sequence[str]
) -> tuple[Recipe, list[jax.Array]]:
    """The recipe of a VJP, and its residuals beyond `inputs`, each with a leading dim of size 1 if it varies."""
    places = {id(x): i for i, x in enumerate(inputs)}
    leaves, tree = jax.tree.flatten(pull)
    kinds: list[int | tuple[str, ...]] = []
    residuals = []
    for leaf in leaves:
        if id(leaf) in places:
            kinds.append(places[id(leaf)])
        else:
            axes = tuple(a for a in axis_names if a in varying_axes(leaf))
            kinds.append(axes)
            residuals.append(leaf[None] if axes else leaf)
    return Recipe(tree, tuple(kinds)), residuals


def put_together(recipe: Recipe, inputs: Sequence[jax.Array], residuals: Sequence[jax.Array]) -> Callable[..., Tree]:
    """The VJP again, from the same inputs and the residuals that `take_apart` gave."""
    remaining = iter(residuals)
    leaves = []
    for kind in recipe.leaves:
        if isinstance(kind, int):
            leaves.append(inputs[kind])
        else:
            residual = next(remaining)
            leaves.append(residual[0] if kind else residual)
    return jax.tree.unflatten(recipe.tree, leaves)


def specs(recipe: Recipe) -> list[P]:
    """Partition specs of the residuals at the edge of the shard_map."""
    return [P(kind) if kind else P() for kind in recipe.leaves if isinstance(kind, tuple)]
