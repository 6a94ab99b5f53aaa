"""What a stage reads of a microbatch, packed: one array of 32-bit words, so that it travels in one put.

A device's shards of all arrays lie in one row, side by side. The rows are cut over the mesh axes that cut the arrays
(dp and cp for text, dp for pictures) and repeated over the others, as the arrays themselves would be. Arrays that are
cut over other axes are packed apart; of the models here, no stage has any.

Packing needs no device, so that a data thread can do it. The programs take the words apart, before they take VJPs: the
pieces are inputs there, and no residuals (see `residuals.py`). Bits arrive as they are.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hetjax.core.layout import zigzag
from hetjax.core.mesh import axis_names
from hetjax.core.put import Put
from hetjax.core.tasks import StageKey

WORD = np.dtype(np.uint32)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array: `cuts` tells, for each axis of the packing, which dim it cuts; `start` and `words` where it lies.

    `zigzag`: the dim whose positions are put into zig-zag order first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    cuts: tuple[int, ...]
    start: int
    words: int
    zigzag: int | None


@dataclasses.dataclass(frozen=True)
class Packing:
    """Arrays that are cut over the same `axes`. Equal packings pack alike."""

    sharding: NamedSharding
    axes: tuple[str | tuple[str, ...], ...]  # entries of a partition spec
    parts: tuple[Part, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """In how many parts each axis cuts."""
        return tuple(math.prod(self.sharding.mesh.shape[n] for n in axis_names(axis)) for axis in self.axes)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The packed array: [*counts, words]."""
        words = sum(part.words for part in self.parts)
        return jax.ShapeDtypeStruct((*self.counts, words), WORD, sharding=self.sharding)

    @functools.cached_property
    def alike(self) -> tuple:
        """Of all packings that make the same words."""
        return self.counts, self.parts, tuple(self._here)

    @functools.cached_property
    def _put(self) -> Put:
        return Put(self.struct)

    @functools.cached_property
    def _parts_here(self) -> list[tuple[slice, ...]]:
        """What of the packed array each of this process's devices wants."""
        places = self.sharding.devices_indices_map(self.struct.shape)
        return [places[device] for device in self._put.devices]

    @functools.cached_property
    def _here(self) -> list[tuple[int, ...]]:
        """Where along `counts` this process's devices stand."""
        return sorted({tuple(part.start or 0 for part in place[: len(self.axes)]) for place in self._parts_here})

    def pack(self, microbatch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The arrays of a global microbatch in one, with the rows of this process's devices alone; zeros elsewhere.

        Raises ValueError for one of another shape or type."""
        packed = np.zeros(self.struct.shape, WORD)
        row = packed.view(np.uint8)
        for part in self.parts:
            shards = self._shards(part, _checked(part, microbatch))
            start, count = part.start * WORD.itemsize, math.prod(shards.shape[len(self.axes) :])
            room = row[..., start : start + count * part.dtype.itemsize].view(part.dtype)
            room = room.reshape(shards.shape)  # a view: the last dim, which is contiguous, is split
            for at in self._here:
                room[at] = shards[at]
        return packed

    def place(self, packed: np.ndarray) -> jax.Array:
        """A packed microbatch on the stage's devices."""
        return self._put([packed[part] for part in self._parts_here])

    def unpack(self, words: jax.Array) -> dict[str, jax.Array]:
        """The shards of one device by name, from its words [1, ..., 1, words]; inside of a per-device program."""
        row = words.reshape(-1)
        return {part.name: self._take(part, row) for part in self.parts}

    def _shards(self, part: Part, array: np.ndarray) -> np.ndarray:
        """[*counts, *shape of a shard]."""
        if part.zigzag is not None:
            ways = self.counts[part.cuts.index(part.zigzag)]
            array = np.take(array, _zigzag(part.shape[part.zigzag], ways), part.zigzag)
        sizes: list[int] = []
        fronts = {}
        for dim, size in enumerate(part.shape):
            if dim in part.cuts:
                fronts[dim] = len(sizes)
                count = self.counts[part.cuts.index(dim)]
                sizes += [count, size // count]
            else:
                sizes.append(size)
        return np.moveaxis(array.reshape(sizes), [fronts[dim] for dim in part.cuts], range(len(part.cuts)))

    def _take(self, part: Part, row: jax.Array) -> jax.Array:
        shape = list(part.shape)
        for dim, count in zip(part.cuts, self.counts, strict=True):
            shape[dim] //= count
        words = lax.slice(row, [part.start], [part.start + part.words])
        if part.dtype.itemsize > WORD.itemsize:
            words = words.reshape(-1, part.dtype.itemsize // WORD.itemsize)
        stored = np.dtype(np.uint8) if part.dtype == np.bool_ else part.dtype
        values = lax.bitcast_convert_type(words, stored).reshape(-1)[: math.prod(shape)].reshape(shape)
        return values != 0 if part.dtype == np.bool_ else values


def packings(batch: Mapping[str, jax.ShapeDtypeStruct], zigzags: Mapping[str, int]) -> tuple[Packing, ...]:
    """How the arrays of `batch`, abstract with their shardings, are packed; `zigzags`: name -> dim of zig-zag order.

    Raises ValueError for a type of 64 bits where jax has them off.
    """
    found: dict[tuple[str | tuple[str, ...], ...], list[Part]] = {}
    for name, struct in batch.items():
        dtype = np.dtype(struct.dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(f"microbatch: {name!r} is {dtype}; set jax_enable_x64, or make it a type of 32 bits")
        cut = {axis: dim for dim, axis in enumerate(struct.sharding.spec) if axis is not None}
        axes = tuple(sorted(cut, key=lambda axis: struct.sharding.mesh.axis_names.index(axis_names(axis)[0])))
        parts = found.setdefault(axes, [])
        start = sum(part.words for part in parts)
        size = math.prod(struct.sharding.shard_shape(struct.shape)) * dtype.itemsize
        cuts = tuple(cut[axis] for axis in axes)
        words = -(-size // WORD.itemsize)
        parts.append(Part(name, tuple(struct.shape), dtype, cuts, start, words, zigzags.get(name)))
    meshes = {struct.sharding.mesh for struct in batch.values()}  # one, or none
    return tuple(
        Packing(NamedSharding(mesh, P(*axes)), axes, tuple(parts)) for mesh in meshes for axes, parts in found.items()
    )


def unpack(packings: Iterable[Packing], words: Iterable[jax.Array]) -> dict[str, jax.Array]:
    """All arrays that a stage reads, on one device."""
    return {k: v for packing, row in zip(packings, words, strict=True) for k, v in packing.unpack(row).items()}


class Recording(dict):
    """A batch that remembers which of its arrays a model read."""

    def __init__(self, items: Mapping[str, jax.Array]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> jax.Array:
        self.read.add(key)
        return super().__getitem__(key)


class Prepared(dict[str, np.ndarray]):
    """A global microbatch, with what each stage reads of it packed already. Its arrays must not be changed.

    `target_count`: the sum of its weights.
    """

    def __init__(self, microbatch: Mapping[str, np.ndarray], packings: Mapping[StageKey, Sequence[Packing]]) -> None:
        super().__init__(microbatch)
        self.packings = packings
        words: dict[tuple, np.ndarray] = {}  # of replicas, once
        for packing in (packing for mine in packings.values() for packing in mine if packing.alike not in words):
            words[packing.alike] = packing.pack(microbatch)
        self.packed = {key: [words[packing.alike] for packing in mine] for key, mine in packings.items()}
        self.target_count = float(microbatch["weights"].sum(dtype=np.float64))


def prepare(microbatch: Mapping[str, np.ndarray], packings: Mapping[StageKey, Sequence[Packing]]) -> Prepared:
    """`microbatch` as it is where it was prepared for such stages, else packed."""
    if isinstance(microbatch, Prepared) and microbatch.packings == packings:
        return microbatch
    return Prepared(microbatch, packings)


def _checked(part: Part, microbatch: Mapping[str, np.ndarray]) -> np.ndarray:
    array = microbatch[part.name]
    if array.shape != part.shape or array.dtype != part.dtype:
        raise ValueError(
            f"microbatch: {part.name!r} is {array.dtype}{list(array.shape)}, the trainer was built for "
            f"{part.dtype}{list(part.shape)}; give it microbatches of the shape in its TrainSpec"
        )
    return array


@functools.cache
def _zigzag(seq: int, ways: int) -> np.ndarray:
    return zigzag(seq, ways)
