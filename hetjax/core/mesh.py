"""The mesh of a stage, and what its axes cut: activations, parameters, gradients, optimizer state.

A layout's axes are made of mesh axes, one each as long as nothing needs a part of them. `Grid` is the one place that
knows which; a model sees a layout's axes (`models/axes.py`), the trainer's programs the names of mesh axes. With
tp=4, of which ep=2 takes the inner half, tp is made of "tp0" and "tp1", and ep of "tp1".
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.layout import AXES, Layout
from models.axes import Axes, Axis
from models.context import GATHER
from models.contract import Dims

LOGICAL: dict[str, tuple[str, ...]] = {
    "batch": ("dp",),
    "items": ("dp",),
    "seq": ("cp",),
    "stream": ("cp", "sp"),  # the tokens between the blocks of a layer
    "shards": ("dp", "cp", "sp"),  # one row for each device that sees other tokens
    "heads": ("tp",),
    "kv_heads": ("kv",),
    "mlp": ("tp",),
    "vocab": ("tp",),
    "experts": ("ep",),
    "expert_mlp": ("etp",),
}
SEEN = ("dp", "cp", "tp", "sp", "ep", "etp", "tp_of_ep")  # by models


@dataclasses.dataclass(frozen=True)
class Grid:
    """A stage's mesh, the mesh axes that each axis of its layout is made of, outermost first, and how attention
    reaches over cp.

    Beside them: "sp", of sequence parallelism, all of tp or nothing. "ep", over which experts are cut; "tp_of_ep", what
    it has of tp; "etp", the rest of tp, which cuts each expert. "kv", that part of tp over which heads of keys and
    values are cut; over the rest they are repeated.
    """

    mesh: Mesh
    parts: Mapping[str, tuple[str, ...]]
    context: str = GATHER

    @property
    def axes(self) -> Axes:
        """What a model sees."""
        return Axes(**{name: self._axis(name) for name in SEEN}, context=self.context)

    @property
    def data(self) -> tuple[str, ...]:
        """The mesh axes along which devices see other data where data meet parameters."""
        return self._parts("dp", "cp", "sp")

    def meets(self, where: P) -> tuple[str, ...]:
        """The mesh axes along which a parameter that lies so, or the data that it meets, differ."""
        own = axes_of(where)
        tp = self.parts["tp"] if own & set(self.parts["tp"]) else ()  # cut over a part of it: what it meets, over all
        return tuple(dict.fromkeys((*self.data, *tp, *sorted(own))))

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
        replicas = tuple(name for name in self.meets(where) if name not in axes_of(where))
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


def make_grid(layout: Layout, devices: Sequence[jax.Device], *, kv_heads: int = 0) -> Grid:
    """The mesh of one stage of a layout on these devices; fewer `kv_heads` than tp, but not 0, are repeated.

    Raises ValueError where ep and the repeats of heads take parts of tp that do not nest.
    """
    experts = layout.expert_shares
    repeats = layout.tp // kv_heads if 0 < kv_heads < layout.tp else 1
    folded = {name: fold(name, getattr(layout, name), [experts.get(name, 1)]) for name in AXES}
    folded["tp"] = fold("tp", layout.tp, [experts["tp"], repeats])
    if repeats == layout.tp > 1:  # for a single head an axis of one device: what it cuts meets the data of all of tp
        folded["tp"] = {"tp_kv": 1, **folded["tp"]}
    parts = {name: tuple(axes) for name, axes in folded.items()}
    inner = {name: innermost(folded[name], size) for name, size in experts.items()}
    parts["ep"] = tuple(axis for name in AXES for axis in inner.get(name, ()))
    parts["tp_of_ep"], parts["sp"] = inner["tp"], parts["tp"] if layout.sp else ()
    parts["etp"] = parts["tp"][: len(parts["tp"]) - len(inner["tp"])]
    parts["kv"] = parts["tp"][: len(parts["tp"]) - len(innermost(folded["tp"], repeats))]
    sizes = {axis: size for axes in folded.values() for axis, size in axes.items()}
    return Grid(Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes)), parts, layout.context)


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
