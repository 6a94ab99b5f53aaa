"""The mesh of a stage, and what its axes cut: activations, parameters, gradients, optimizer state.

A layout's axes are made of mesh axes, one each as long as nothing needs a part of them. `Grid` is the one place that
knows which; a model sees a layout's axes (`models/axes.py`), the trainer's programs the names of mesh axes.
"""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.axes import Axes, Axis
from models.context import GATHER
from models.contract import Dims

LOGICAL: dict[str, tuple[str, ...]] = {
    "batch": ("dp",),
    "items": ("dp",),
    "seq": ("cp",),
    "stream": ("cp", "sp"),  # the tokens between the blocks of a layer
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "vocab": ("tp",),
    "experts": (),  # every device of a stage holds all of them
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """A stage's mesh, the mesh axes that each axis of its layout is made of, outermost first, and how attention
    reaches over cp.

    "sp", of sequence parallelism, is made of what tp is made of, or of nothing.
    """

    mesh: Mesh
    parts: Mapping[str, tuple[str, ...]]
    context: str = GATHER

    @property
    def axes(self) -> Axes:
        """What a model sees."""
        return Axes(**{name: self._axis(name) for name in ("dp", "cp", "tp", "sp")}, context=self.context)

    @property
    def data(self) -> tuple[str, ...]:
        """The mesh axes along which devices see other data where data meet parameters."""
        return self._parts("dp", "cp", "sp")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The mesh axes over which the microbatch's tokens are cut."""
        return self._parts("dp", "cp")

    def spec(self, dims: Dims) -> P:
        """The partition spec of a tensor with these logical dims."""
        return P(*(_entry(self._parts(*LOGICAL[dim])) if dim else None for dim in dims))

    def sharding(self, dims: Dims) -> NamedSharding:
        """The sharding of a tensor with these logical dims."""
        return NamedSharding(self.mesh, self.spec(dims))

    def size(self, names: tuple[str, ...]) -> int:
        """Devices along these mesh axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def spread(self, shape: tuple[int, ...], where: P, *, stacked: bool = False) -> "Spread":
        """How a parameter of this shape, which the programs take as `where` says, is spread over the data replicas.

        ZeRO-1 takes the first dim of which the shards divide. `stacked`: the first dim counts layers, which are stored
        one by one, and is left alone.
        """
        replicas = tuple(name for name in self.data if name not in axes_of(where))
        count, entries = self.size(replicas), [*where, *[None] * (len(shape) - len(where))]
        for dim, (size, entry) in enumerate(zip(shape, entries, strict=True)):
            names = axis_names(entry)
            if count > 1 and size // self.size(names) % count == 0 and not (stacked and dim == 0):
                cut = P(*entries[:dim], (*names, *replicas), *entries[dim + 1 :])
                return Spread(where, replicas, count, cut, dim)
        return Spread(where, replicas, count, where, None)

    def _axis(self, name: str) -> Axis:
        return Axis(self.parts[name], self.size(self.parts[name]))

    def _parts(self, *names: str) -> tuple[str, ...]:
        return tuple(part for name in names for part in self.parts[name])


@dataclasses.dataclass(frozen=True)
class Spread:
    """How one parameter, its gradient and its optimizer state lie on a stage's devices.

    where: its spec in the programs. replicas: the mesh axes over which it is repeated while its data vary, so that its
    gradient is summed over them once a step; count: devices along them. cut: the spec of its gradient and optimizer
    state, over the replicas too (ZeRO-1), along `dim`; where no dim divides, `dim` is None and each replica keeps all.
    """

    where: P
    replicas: tuple[str, ...]
    count: int
    cut: P
    dim: int | None

    @property
    def accumulator(self) -> P:
        """The spec of its accumulator with a leading dim over the replicas."""
        return P(self.replicas, *self.where)


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names if len(names) > 1 else names[0] if names else None


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def axes_of(where: P) -> frozenset[str]:
    """The mesh axes that a partition spec names."""
    return frozenset(axis for entry in where for axis in axis_names(entry))
