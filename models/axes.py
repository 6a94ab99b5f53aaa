"""What a model sees of its mesh: a small record of axes, each the identity where it is absent.

A stage runs as one per-device program (`jax.shard_map`). The model inside it never names a mesh; it is handed an `Axes`
and writes `axes.tp.psum(x)` or `axes.cp.gather(k, dim=1)`. With `ONE_DEVICE` the same function is ordinary code.
"""

import dataclasses
from typing import Any

import jax
from jax import lax


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a layout, and the mesh axes that it is made of, outermost first. None means that it is absent: every
    collective is the identity, the index is 0."""

    names: tuple[str, ...] = ()
    size: int = 1

    def vary(self, x: jax.Array) -> jax.Array:
        """`x`, typed as varying over the axis."""
        return vary(x, self.names) if self.names else x

    def psum(self, x: jax.Array) -> jax.Array:
        """Sum of `x` over the axis, the same on each of its devices."""
        return lax.psum(x, self.names) if self.names else x

    def pmax(self, x: jax.Array) -> jax.Array:
        """Largest `x` over the axis (not differentiable: stop the gradient first)."""
        return lax.pmax(x, self.names) if self.names else x

    def gather(self, x: jax.Array, dim: int) -> jax.Array:
        """All shards of `x`, concatenated along `dim` in axis order; its transpose is a reduce-scatter."""
        return lax.all_gather(x, self.names, axis=dim, tiled=True) if self.names else x

    def scatter(self, x: jax.Array, dim: int) -> jax.Array:
        """The sum of `x` over the axis, of which each device takes its part along `dim`."""
        return lax.psum_scatter(x, self.names, scatter_dimension=dim, tiled=True) if self.names else x

    def exchange(self, x: jax.Array, cut: int, join: int) -> jax.Array:
        """`x` cut along `cut` into one part for each device, and what all sent here concatenated along `join`."""
        return lax.all_to_all(x, self.names, cut, join, tiled=True) if self.names else x

    def passed(self, x: jax.Array) -> jax.Array:
        """The `x` of the device before this one, in a ring: each passes its own on to the next."""
        return lax.ppermute(x, self.names, [(i, (i + 1) % self.size) for i in range(self.size)]) if self.names else x

    def index(self) -> jax.Array | int:
        """This device's position on the axis."""
        return lax.axis_index(self.names) if self.names else 0


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one stage: data (dp), context (cp) and tensor (tp).

    sp: tp again where, between the blocks of a layer, tokens are cut over it (sequence parallelism), else absent.
    ep cuts the experts; tp_of_ep is what it has of tp, and etp the rest of tp, which cuts each expert.
    context: how attention reaches over cp (`models/context.py`).
    """

    dp: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()
    sp: Axis = Axis()
    ep: Axis = Axis()
    etp: Axis = Axis()
    tp_of_ep: Axis = Axis()
    context: str = "gather"

    @property
    def stream(self) -> Axis:
        """What cuts the tokens between the blocks of a layer."""
        return Axis(self.cp.names + self.sp.names, self.cp.size * self.sp.size)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over tp of partial results `x` [b, s, d]; where sp cuts the tokens, this device's of it."""
        return self.sp.scatter(x, dim=1) if self.sp.names else self.tp.psum(x)


ABSENT = Axis()
ONE_DEVICE = Axes()


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Names of the mesh axes over which `x` differs between devices, inside a shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: jax.Array, names: frozenset[str] | tuple[str, ...]) -> jax.Array:
    """`x`, typed as varying over `names` too; the transpose sums over them. No bytes move."""
    missing = tuple(sorted(set(names) - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, typed as varying over all that `other` varies over (a scan carry must have its body's type)."""
    return vary(x, varying_axes(other))


def program_device() -> Any:
    """A device that the program is for: of the mesh, which need not be of this process, or of the process."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def sum_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, summed over the axes over which `other` does not vary: the transpose of casting `other` to its type."""
    extra = tuple(sorted(varying_axes(x) - varying_axes(other)))
    return lax.psum(x, extra) if extra else x
