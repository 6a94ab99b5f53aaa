"""Writes a converted checkpoint: the parameters of a source with all that its export will need.

Arrays go from the folder into the checkpoint a few at a time: a process holds the largest of them, never the model.
"""

import asyncio
import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from hetjax.hf import pieces, tensors
from hetjax.hf.errors import ConvertError
from hetjax.hf.folder import Folder, stored_tensor
from hetjax.hf.output import written
from hetjax.hf.source import Array, Sliceable
from hetjax.hf.stored import FILES, MODEL, PARAMS, UNUSED
from hetjax.run import config
from hetjax.run.names import nested

AT_ONCE = 2**24  # bytes that are written together, at least: each write leaves a version of the index


def store(folder: Folder, out: str | Path) -> None:
    """Writes the folder as a checkpoint at `out`, in the precision that it has. Raises ConvertError."""
    arrays = folder.fetch(list(folder.arrays))
    extras = next(iter(folder.extras.values()))  # one folder: the same for all
    with written(out) as new:
        (new / FILES).mkdir(parents=True)
        _save(new / PARAMS, {name: _Later(array, folder.arrays[name]) for name, array in arrays.items()})
        (new / MODEL).write_text(config.operative(folder.parts))
        for name, path in {"config.json": folder.path / "config.json", **extras.files}.items():
            (new / FILES / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / FILES / name)
        unused = {key: stored_tensor(path, extras.spelled[key]) for key, path in extras.idle.items()}
        if unused:
            tensors.write(new / UNUSED, unused)


@dataclasses.dataclass(frozen=True)
class _Later:
    """An array that is read when it is written."""

    array: Sliceable
    kind: Array

    @property
    def num_bytes(self) -> int:
        return math.prod(self.kind.shape) * self.kind.dtype.itemsize

    def read(self) -> np.ndarray:
        return pieces.on_host(self.array, self.kind)


class _InTurn(type_handlers.NumpyHandler):
    """Writes arrays as Orbax writes those of numpy: as many at once as the largest has bytes, then the next."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None) -> list:
        args = args or [ocp.SaveArgs()] * len(values)
        most, start = max(AT_ONCE, *(value.num_bytes for value in values)), 0
        while start < len(values):
            stop, size = start + 1, values[start].num_bytes
            while stop < len(values) and size + values[stop].num_bytes <= most:
                size, stop = size + values[stop].num_bytes, stop + 1
            some = slice(start, stop)
            for writing in await super().serialize([v.read() for v in values[some]], infos[some], args[some]):
                await asyncio.to_thread(writing.result)
            start = stop
        return []


def _save(path: Path, arrays: dict[str, _Later]) -> None:
    handlers = type_handlers.create_type_handler_registry(
        (_Later, _InTurn(deepcopy_host_arrays=False)), (jax.Array, type_handlers.ArrayHandler())
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as writer:
        writer.save(path, {"params": nested(arrays)})


def check_folder(source: object) -> Folder:
    """`source`, if it is a Hugging Face folder. Raises ConvertError."""
    if not isinstance(source, Folder):
        raise ConvertError(f"{getattr(source, 'path', source)} is no Hugging Face folder: it has no config.json")
    return source
