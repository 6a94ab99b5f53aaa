"""Models whose layers sleep beside what they compute: work that keeps no core busy, so that emulated devices of a
machine with few cores work side by side as real ones do."""

import ctypes
import dataclasses
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.contract import ModuleDef, Part
from models.opaque import opaque

BACKWARD = 2  # times the forward's sleep
TARGET = "hetjax_sleep"
SOURCE = """
#include <cstring>
#include <ctime>
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;

extern "C" int64_t hetjax_micros;
int64_t hetjax_micros = 0;

static ffi::Error Sleep(int64_t times, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  int64_t micros = times * hetjax_micros;
  timespec left = {micros / 1000000, micros % 1000000 * 1000};
  nanosleep(&left, nullptr);
  std::memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HetjaxSleep, Sleep, ffi::Ffi::Bind().Attr<int64_t>("times").Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
"""


@functools.cache
def build() -> ctypes.c_int64:
    """Compiles the sleep and registers it; gives the microseconds of a layer's forward, which may be set at any time.
    Raises OSError without a C++ compiler."""
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "sleep.cc"), Path(directory, "sleep.so")
        source.write_text(SOURCE)
        line = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
        subprocess.run([*line, "-o", library, source], check=True)
        loaded = ctypes.CDLL(str(library))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(loaded.HetjaxSleep), platform="cpu")
    return ctypes.c_int64.in_dll(loaded, "hetjax_micros")


def _run(x: jax.Array, times: int) -> list[jax.Array]:
    return [jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, times=np.int64(times))]


_sleep = opaque("asleep", _run, lambda x, times: [(x.shape, x.dtype)])


@jax.custom_vjp
def asleep(x: jax.Array) -> jax.Array:
    """`x`, after a sleep; its cotangent after `BACKWARD` of them."""
    return _sleep.bind(x, times=1)[0]


asleep.defvjp(lambda x: (asleep(x), None), lambda _, g: (_sleep.bind(g, times=BACKWARD)[0],))


@dataclasses.dataclass(frozen=True)
class Sleeping:
    """A model each of whose layers sleeps."""

    model: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def module(self, *given: Any, **named: Any) -> ModuleDef:
        """The model's module."""
        plain = self.model.module(*given, **named)
        parts = {part: self._part(part) for part in dict.fromkeys(map(_Same, plain.layers))}
        return dataclasses.replace(plain, layers=tuple(parts[_Same(part)] for part in plain.layers))

    def _part(self, same: "_Same") -> Part:
        def apply(params: Any, x: Any, batch: Any, axes: Any) -> Any:
            carry = same.part.apply(params, x, batch, axes)
            return {**carry, "x": asleep(carry["x"])}

        return dataclasses.replace(same.part, apply=apply)


class _Same:
    """A part, equal to itself alone: layers of the same object are scanned."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.part is other.part

    def __hash__(self) -> int:
        return id(self.part)
