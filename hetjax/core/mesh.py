"""The mesh of a stage, and what its axes cut: activations, parameters, gradients, optimizer state.

A layout's axes are made of mesh axes, one each as long as nothing needs a part of them. `Grid` is the one place that
knows which; a model sees a layout's axes (`models/axes.py`), the trainer's programs the names of mesh axes. With dp=4,
of which zero_size=2 takes the inner half, dp is made of "dp0" and "dp1".
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.axes import Axes, Axis
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
    """A stage's mesh, and the mesh axes that each axis of its layout is made of, outermost first.

    Beside them: "sp", of sequence parallelism, all of tp or nothing. "across", that part of dp over which ZeRO repeats
    its shards. `zero` is its stage, 1 to 3.
    """

    mesh: Mesh
    parts: Mapping[str, tuple[str, ...]]
    zero: int = 1

    @property
    def axes(self) -> Axes:
        """What a model sees."""
        return Axes(**{name: self._axis(name) for name in ("dp", "cp", "tp", "sp")})

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

    def spread(self, shape: tuple[int, ...], where: P, *, stacked: bool = False, multiplies: bool = False) -> "Spread":
        """How a parameter of this shape, which the programs take as `where` says, is spread over the data replicas.

        ZeRO takes the first dim of which the shards divide. `stacked`: the first dim counts layers, which are stored
        one by one, and is left alone. `multiplies`: the parameter only ever enters products; others are small, and
        their gradients are scattered once a step whatever the stage of ZeRO.
        """
        replicas = tuple(name for name in self.data if name not in axes_of(where))
        inside = tuple(name for name in replicas if name not in self.parts["across"])
        shards, entries = self.size(inside), [*where, *[None] * (len(shape) - len(where))]
        for dim, (size, entry) in enumerate(zip(shape, entries, strict=True)):
            names = axis_names(entry)
            if shards > 1 and size // self.size(names) % shards == 0 and not (stacked and dim == 0):
                cut, early = P(*entries[:dim], (*names, *inside), *entries[dim + 1 :]), multiplies and self.zero > 1
                count = self.size(replicas) // (shards if early else 1)
                return Spread(where, replicas, count, cut, dim, inside, early)
        return Spread(where, replicas, self.size(replicas), where, None)

    def _axis(self, name: str) -> Axis:
        return Axis(self.parts[name], self.size(self.parts[name]))

    def _parts(self, *names: str) -> tuple[str, ...]:
        return tuple(part for name in names for part in self.parts[name])


@dataclasses.dataclass(frozen=True)
class Spread:
    """How one parameter, its gradient and its optimizer state lie on a stage's devices.

    where: its spec in the programs. replicas: the mesh axes over which it is repeated while its data vary, so that its
    gradient is summed over them. cut: the spec of its gradient and optimizer state, over `inside`, replicas too
    (ZeRO), along `dim`; where no dim divides, `dim` is None, `inside` is empty, and each replica keeps all. early: the
    gradient of each microbatch is scattered over `inside`, and accumulated in shards (ZeRO-2, 3); else that of the
    step. count: how many accumulators are summed at the step's end.
    """

    where: P
    replicas: tuple[str, ...]
    count: int
    cut: P
    dim: int | None
    inside: tuple[str, ...] = ()
    early: bool = False

    @property
    def outside(self) -> tuple[str, ...]:
        """The replicas over which `cut` repeats."""
        return tuple(name for name in self.replicas if name not in self.inside)

    @property
    def accumulator(self) -> P:
        """The spec of its accumulator with a leading dim over the replicas that have their own."""
        return P(self.outside or None, *self.cut) if self.early else P(self.replicas, *self.where)


def fold(axis: str, size: int, inner: Iterable[int]) -> dict[str, int]:
    """The mesh axes, outermost first, that make up an axis of a layout of which `inner` parts are used alone.

    Raises ValueError where two of these parts do not nest.
    """
    sizes = []
    for small, large in itertools.pairwise(sorted({1, *inner, size})):
        if large % small:
            raise ValueError(f"inner parts of {axis}={size} of {small} and of {large} devices do not nest")
        sizes.append(large // small)
    if len(sizes) <= 1:
        return {axis: size}
    return {f"{axis}{n}": part for n, part in enumerate(reversed(sizes))}


def innermost(parts: Mapping[str, int], size: int) -> tuple[str, ...]:
    """Those of the mesh axes `parts` that make up the inner `size` devices."""
    names = list(parts)
    while names and math.prod(parts[name] for name in names) > size:
        names.pop(0)
    return tuple(names) if size > 1 else ()


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names if len(names) > 1 else names[0] if names else None


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def axes_of(where: P) -> frozenset[str]:
    """The mesh axes that a partition spec names."""
    return frozenset(axis for entry in where for axis in axis_names(entry))
