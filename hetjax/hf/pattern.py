"""How one of our arrays lies in a torch tensor, written as "d h k -> (h k) d": ours on the left, theirs on the right.

Each group of letters on the right is one dim of the torch tensor. A range of rows of ours is then a range of rows of
theirs, which is what lets a shard be read without the rest.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A permutation of our dims with some of them merged. Parse it with `parse`."""

    groups: tuple[tuple[int, ...], ...]  # for each torch dim, the positions of our dims in it

    @property
    def order(self) -> tuple[int, ...]:
        """Our dims in the order in which torch stores them."""
        return tuple(dim for group in self.groups for dim in group)

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the torch tensor of an array of ours of `shape`."""
        return tuple(math.prod(shape[dim] for dim in group) for group in self.groups)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The torch tensor's values, contiguous: safetensors writes a strided array's bytes in the wrong order."""
        return np.ascontiguousarray(array.transpose(self.order)).reshape(self.torch_shape(array.shape))

    def from_torch(self, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Our array of `shape`."""
        split = tensor.reshape([shape[dim] for dim in self.order])
        return split.transpose(np.argsort(self.order))

    def box(self, index: Index, shape: Sequence[int]) -> tuple[Index, tuple[int, ...], Index]:
        """What to read for `index` of our array of `shape`: (range of the torch tensor, shape of that in our dims,
        what of it to keep). The first dim of a merged group is cut while reading, the others after it."""
        ranges = [i.indices(n)[:2] for i, n in zip(index, shape, strict=True)]
        theirs, found, kept = [], list(shape), [slice(None)] * len(shape)
        for group in self.groups:
            lead, inner = group[0], math.prod(shape[dim] for dim in group[1:])
            start, stop = ranges[lead]
            theirs.append(slice(start * inner, stop * inner))
            found[lead] = stop - start
            for dim in group[1:]:
                kept[dim] = slice(*ranges[dim])
        return tuple(theirs), tuple(found), tuple(kept)


@functools.cache
def parse(text: str) -> Pattern:
    """The pattern that `text` writes down."""
    ours, theirs = text.split("->")
    names = ours.split()
    groups = (a or b for a, b in re.findall(r"\(([^)]*)\)|(\w+)", theirs))
    return Pattern(tuple(tuple(names.index(name) for name in group.split()) for group in groups))
