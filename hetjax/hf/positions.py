"""Position tables of another picture size, as the `interpolate_pos_encoding` of transformers' towers resizes them.

Bicubic (Keys, 1981, with a=-0.75, as torch has it), without smoothing, the outermost rows repeated beyond the edge. A
class token's position stays as it is.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from hetjax.hf.source import Array, Extras, Sliceable, Source
from models.vit import ViT

TABLE = "first/position"


class Resized:
    """A source whose tower `module`, a ViT, sees pictures of `image_size` pixels."""

    def __init__(self, source: Source, module: str, image_size: int) -> None:
        self.path = source.path
        self._source, self._table = source, f"{module}/{TABLE}"
        self._model: ViT = source.models[module]
        self._resized = dataclasses.replace(self._model, image_size=image_size)
        self.models = {**source.models, module: self._resized}
        shape = (self._resized.num_tokens, self._resized.width)
        dtype = np.promote_types(source.arrays[self._table].dtype, np.float32)
        self.arrays: Mapping[str, Array] = {**source.arrays, self._table: Array(shape, dtype)}

    @property
    def extras(self) -> Mapping[str, Extras]:
        """What came with each module."""
        return self._source.extras

    def fetch(self, names: Sequence[str]) -> Mapping[str, Sliceable]:
        """The arrays; the position table is read and resized at once."""
        found = dict(self._source.fetch(names))
        if self._table in found:
            table = found[self._table][:, :].astype(self.arrays[self._table].dtype)
            found[self._table] = resize(table, self._resized.num_patches)
        return found


def resize(table: np.ndarray, num_patches: int) -> np.ndarray:
    """A table [n, d] as one [n - p + num_patches, d], p the largest square that n holds: what is before it stays."""
    old, new = math.isqrt(len(table)), math.isqrt(num_patches)
    if old == new:
        return table
    before, patches = np.split(table, [len(table) - old**2])
    weights = _weights(old, new).astype(table.dtype)
    grid = patches.reshape(old, old, -1)
    columns = np.einsum("mw,hwd->hmd", weights, grid)
    return np.concatenate([before, np.einsum("nh,hmd->nmd", weights, columns).reshape(new**2, -1)])


def _weights(old: int, new: int) -> np.ndarray:
    """[new, old]: each new place as a sum of four old ones."""
    place = (np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5  # in float32, as torch
    first = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        neighbour = np.clip(first + offset, 0, old - 1)
        np.add.at(weights, (np.arange(new), neighbour), _keys(np.abs(place - first - offset)))
    return weights


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The kernel at distances 0 to 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)
