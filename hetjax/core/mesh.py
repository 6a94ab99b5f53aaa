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
PADDED = frozenset({"vocab"})  # dims that are made longer where the devices that cut them do not divide them
SEEN = ("dp", "cp", "tp", "sp", "ep", "etp", "tp_of_ep")  # by models


@dataclasses.dataclass(frozen=True)
class Grid:
    """A stage's mesh, the mesh axes that each axis of its layout is made of, outermost first, and how attention
    reaches over cp.

    Beside them: "sp", of sequence parallelism, all of tp or nothing. "ep", over which experts are cut; "tp_of_ep", what
    it has of tp; "etp", the rest of tp, which cuts each expert. "kv", that part of tp over which heads of keys and
    values are cut; over the rest they are repeated. "across", that part of dp over which ZeRO repeats its shards.
    `zero` is its stage, 1 to 3.
    """

    mesh: Mesh
    parts: Mapping[str, tuple[str, ...]]
    context: str = GATHER
    zero: int = 1

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

    def padded(self, shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
        """The shape that a tensor with these logical dims is given, zeros behind its values, so that it can be cut."""
        ways = [self.size(self._parts(*LOGICAL[dim])) if dim in PADDED else 1 for dim in dims]
        return tuple(-(-size // count) * count for size, count in zip(shape, ways, strict=True))

    def fitting(self, shape: tuple[int, ...], where: P) -> P:
        """`where` for a tensor of this shape: mesh axes that do not divide their dim cut the first other one that they
        divide, or none."""
        entries = [*map(axis_names, where), *[()] * (len(shape) - len(where))]
        for dim, names in enumerate(entries):
            if shape[dim] % self.size(names):
                entries[dim] = ()
                others = (d for d in range(len(shape)) if d != dim and not shape[d] % self.size((*entries[d], *names)))
                if (other := next(others, None)) is not None:
                    entries[other] = (*entries[other], *names)
        return P(*map(_entry, entries))

    def size(self, names: tuple[str, ...]) -> int:
        """Devices along these mesh axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def spread(self, shape: tuple[int, ...], where: P, *, stacked: bool = False, multiplies: bool = False) -> "Spread":
        """How a parameter of this shape, which the programs take as `where` says, is spread over the data replicas.

        ZeRO takes the first dim of which the shards divide. `stacked`: the first dim counts layers, which are stored
        one by one, and is left alone. `multiplies`: the parameter only ever enters products; others are small, and
        their gradients are scattered once a step whatever the stage of ZeRO.
        """
        replicas = tuple(name for name in self.meets(where) if name not in axes_of(where))
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
        """The spec of its accumulator where it is added to: with a leading dim over the replicas that have their own;
        where that is one, its mesh axes, of one device, go with the first dim."""
        own, where = (self.outside, self.cut) if self.early else (self.replicas, self.where)
        if self.count > 1:
            return P(own or None, *where)
        first, *others = where or (None,)
        return P((*axis_names(first), *own) or None, *others)


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
    found: list[str] = []
    for name in reversed(list(parts)):
        if size == 1:
            break
        found.insert(0, name)
        size //= parts[name]
    return tuple(found)


def make_grid(layout: Layout, devices: Sequence[jax.Device], *, kv_heads: int = 0) -> Grid:
    """The mesh of one stage of a layout on these devices; fewer `kv_heads` than tp, but not 0, are repeated.

    Raises ValueError where ep, the repeats of heads and zero_size take parts of an axis that do not nest.
    """
    experts = layout.expert_shares
    repeats = layout.tp // kv_heads if 0 < kv_heads < layout.tp else 1
    alone = {name: [size] for name, size in experts.items()}  # the inner parts of an axis that are used alone
    alone["tp"].append(repeats)
    shared = layout.zero_size or layout.dp
    alone["dp"].append(shared)
    folded = {name: fold(name, getattr(layout, name), alone.get(name, ())) for name in AXES}
    if repeats == layout.tp > 1:  # for a single head an axis of one device: what it cuts meets the data of all of tp
        folded["tp"] = {"tp_kv": 1, **folded["tp"]}
    parts = {name: tuple(axes) for name, axes in folded.items()}
    inner = {name: innermost(folded[name], size) for name, size in experts.items()}
    parts["ep"] = tuple(axis for name in AXES for axis in inner.get(name, ()))
    parts["tp_of_ep"], parts["sp"] = inner["tp"], parts["tp"] if layout.sp else ()
    parts["etp"] = parts["tp"][: len(parts["tp"]) - len(inner["tp"])]
    repeated = len(parts["dp"]) - len(innermost(folded["dp"], shared))
    parts["across"] = parts["dp"][:repeated] if shared < layout.dp else ()
    parts["kv"] = parts["tp"][: len(parts["tp"]) - len(innermost(folded["tp"], repeats))]
    sizes = {axis: size for axes in folded.values() for axis, size in axes.items()}
    return Grid(Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes)), parts, layout.context, layout.zero)


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names if len(names) > 1 else names[0] if names else None


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def axes_of(where: P) -> frozenset[str]:
    """The mesh axes that a partition spec names."""
    return frozenset(axis for entry in where for axis in axis_names(entry))
