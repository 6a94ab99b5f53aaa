"""A step's decision: small arrays of all stages come to one device, a program there decides, every process hears."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, SingleDeviceSharding

from hetjax.core import processes
from hetjax.core.put import Put
from hetjax.core.sends import Send, Sends

Tree = Any


class Decision:
    """`function(parts, *rest)` on the device `home`.

    `parts`: abstract arrays, each of which lies on the device of the same place in `devices`; `rest`: what is at home
    already, or comes from the host there. The result is small; where there are several processes, it travels to the
    first of `everywhere` that each of them drives as one array.
    """

    def __init__(
        self,
        function: Callable[..., Tree],
        parts: Sequence[jax.ShapeDtypeStruct],
        devices: Sequence[jax.Device],
        rest: Sequence[Tree],
        *,
        home: jax.Device,
        everywhere: Sequence[jax.Device],
    ) -> None:
        self._function, self._rest, self._num = function, tuple(rest), len(parts)
        self.home = home
        self._program: Any = None
        self._unpack: Any = None
        at_home = [self._on(home, part) for part in parts]
        self._args = (at_home, *self._rest)
        ends = enumerate(zip(at_home, devices, strict=True))
        self._there = Sends([Send(part, device, home, n, self._num + n) for n, (part, device) in ends])
        result = jax.eval_shape(function, *self._args)
        self._packed = self._on(home, jax.eval_shape(lambda tree: ravel_pytree(tree)[0], result))
        self._result = result
        self._tell = Telling([self._packed], home, everywhere)
        self._decides = processes.is_mine(home)

    def compile(self) -> None:
        """Its programs, as far as this process runs them."""
        together = jax.process_count() == 1
        function = self._function if together else lambda *args: ravel_pytree(self._function(*args))[0]
        if self._decides:
            self._program = jax.jit(function).lower(*self._args).compile()
        if not together:
            unpack = ravel_pytree(jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), self._result))[1]
            self._unpack = jax.jit(unpack).lower(self._on(self._tell.mine, self._packed)).compile()

    def __call__(self, parts: Sequence[jax.Array | None], *rest: Tree) -> Tree:
        """The result, on a device of this process."""
        values: list[Any] = [*parts, *parts]
        self._there.run(values)
        found = self._program(values[self._num :], *rest) if self._program else None
        if self._unpack is None:
            return found
        return self._unpack(*self._tell([found]))

    def _on(self, device: jax.Device, struct: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=SingleDeviceSharding(device))


class Telling:
    """Arrays on the device `home`, on the first of `everywhere` that each process drives."""

    def __init__(
        self, arrays: Sequence[jax.ShapeDtypeStruct], home: jax.Device, everywhere: Sequence[jax.Device]
    ) -> None:
        hearers, self._num = processes.firsts(everywhere), len(arrays)
        self.mine = hearers[list(map(processes.is_mine, hearers)).index(True)]
        places = [(n, to, (1 + m) * self._num + n) for m, to in enumerate(hearers) for n in range(self._num)]
        self._sends = Sends([Send(arrays[n], home, to, n, arrival) for n, to, arrival in places])
        self._size, self._heard = (1 + len(hearers)) * self._num, (1 + hearers.index(self.mine)) * self._num

    def __call__(self, arrays: Sequence[jax.Array | None]) -> list[jax.Array]:
        """The arrays on a device of this process; None: they come from another."""
        values: list[Any] = [*arrays, *[None] * (self._size - self._num)]
        self._sends.run(values)
        return values[self._heard : self._heard + self._num]


class Spreading:
    """A value like the abstract one, on all devices of this process in each of these shardings, which repeat it."""

    def __init__(self, value: Any, shardings: Mapping[Any, NamedSharding]) -> None:
        at = lambda sharding: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        self._puts = {key: Put(at(sharding)) for key, sharding in shardings.items()}

    def __call__(self, value: jax.Array) -> dict[Any, jax.Array]:
        return {key: put([value] * len(put.devices)) for key, put in self._puts.items()}
