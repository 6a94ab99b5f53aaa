"""VJPs that cross from the forward program to the backward program without a copy of anything both are given.

`jax.vjp` returns a pytree of residuals. Those that ARE inputs of the program or of a scan's body (weights, frozen
weights, activations that came in, pixels, rotary tables) are recognised by identity at trace time and left out: the
backward program is given the same inputs and puts them back. What remains leaves the shard_map with a leading dim over
exactly the axes that it varies over; fewer or more would change its type and the transposed program would not
type-check.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from models.axes import varying_axes

Tree = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("tree", "places"))
@dataclasses.dataclass(frozen=True)
class Kept:
    """A VJP without its inputs: what is left of its leaves, and for each leaf the input that it is, or None."""

    arrays: list[jax.Array]
    tree: Any
    places: tuple[int, ...]


def vjp(function: Callable[[Tree, Tree], Tree], w: Tree, x: Tree, inputs: Sequence[jax.Array]) -> tuple[Tree, Kept]:
    """`function(w, x)`, and its VJP without `inputs`."""
    y, pull = jax.vjp(function, w, x)
    return y, take_apart(pull, inputs)


def take_apart(pull: Callable[..., Tree], inputs: Sequence[jax.Array]) -> Kept:
    """A VJP without `inputs`."""
    leaves, tree = jax.tree.flatten(pull)
    known = list(inputs)
    numbers = {id(x): i for i, x in enumerate(known)}
    for leaf in leaves:
        if id(leaf) not in numbers:
            numbers[id(leaf)] = len(known)
            known.append(leaf)
    return Kept(known[len(inputs) :], tree, tuple(numbers[id(leaf)] for leaf in leaves))


def put_together(kept: Kept, inputs: Sequence[jax.Array]) -> Callable[..., Tree]:
    """The VJP again, from the same inputs."""
    known = [*inputs, *kept.arrays]
    return jax.tree.unflatten(kept.tree, [known[n] for n in kept.places])


@dataclasses.dataclass(frozen=True)
class Crossing:
    """How VJPs, any tree of `Kept`, pass the edge of a shard_map: their structure, and the axes of each array."""

    tree: Any
    axes: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, kept: Tree) -> "Crossing":
        """That of VJPs inside of the shard_map."""
        arrays, tree = jax.tree.flatten(kept)
        return cls(tree, tuple(tuple(sorted(varying_axes(x))) for x in arrays))

    @property
    def specs(self) -> list[P]:
        """Partition specs of the arrays at the edge."""
        return [P(axes) if axes else P() for axes in self.axes]

    def out(self, kept: Tree) -> list[jax.Array]:
        """The arrays as they leave the forward program, with a leading dim of size 1 where they vary."""
        return [x[None] if axes else x for x, axes in zip(jax.tree.leaves(kept), self.axes, strict=True)]

    def back(self, arrays: Sequence[jax.Array]) -> Tree:
        """The VJPs in the backward program."""
        return jax.tree.unflatten(self.tree, [x[0] if axes else x for x, axes in zip(arrays, self.axes, strict=True)])
