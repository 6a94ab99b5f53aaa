"""Safetensors files written tensor by tensor: no more than one of them is in memory.

Header and order are those of the safetensors library, whose own writer wants all tensors at once. The format is at
https://huggingface.co/docs/safetensors: the header's length (8 bytes), the header (JSON), the tensors' bytes.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

CODES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}  # in the order of the library's files
METADATA = {"format": "pt"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `read` gives its values, contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file, in which each tensor is read when its turn comes."""
    code_of = {dtype: code for code, dtype in CODES.items()}
    rank = list(CODES.values()).index
    ordered = sorted(tensors, key=lambda key: (rank(tensors[key].dtype), key))
    header: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for key in ordered:
        tensor, start = tensors[key], end
        end += tensor.num_bytes
        header[key] = {"dtype": code_of[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in ordered:
            file.write(_bytes(tensors[key]))


def _bytes(tensor: Tensor) -> memoryview:
    values = tensor.read()
    assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
    return values.reshape(-1).view(np.uint8).data
