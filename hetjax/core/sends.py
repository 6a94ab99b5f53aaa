"""Single-device arrays on their way from device to device, within a process and between processes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from hetjax.core import processes
from hetjax.core.put import Put


@dataclasses.dataclass(frozen=True)
class Send:
    """A piece that goes from one device to another: from one place in the list of a call's values to another."""

    piece: jax.ShapeDtypeStruct
    source: jax.Device
    to: jax.Device
    origin: int
    arrival: int

    def __post_init__(self) -> None:
        # jax's transfer of an empty array to another process never arrives (0.10.2 and 0.12). None is sent: `wire.py`
        # makes no empty piece, and what a step's end tells has elements.
        assert 0 not in self.piece.shape, self

    def at(self, device: jax.Device) -> jax.ShapeDtypeStruct:
        """The piece on one of its ends."""
        return jax.ShapeDtypeStruct(self.piece.shape, self.piece.dtype, sharding=SingleDeviceSharding(device))


class Sends:
    """Pieces on their way, one by one; those that change their process in the order that all processes share (see
    `processes.py`; a batch of them is lost in jax 0.10.2)."""

    def __init__(self, sends: Sequence[Send]) -> None:
        self.crossing = [send for send in sends if send.source.process_index != send.to.process_index]
        inside = [send for send in sends if processes.is_mine(send.source) and processes.is_mine(send.to)]
        self._inside = [(send.origin, send.arrival, Put(send.at(send.to))) for send in inside]
        absent = [send for send in self.crossing if not processes.is_mine(send.source)]
        self._absent = {send.origin: processes.elsewhere(send.at(send.source)) for send in absent}

    def run(self, values: list[Any]) -> None:
        """Fills the places of arrival."""
        for origin, arrival, put in self._inside:
            values[arrival] = put([values[origin]])
        for send in self.crossing:
            piece = self._absent[send.origin] if send.origin in self._absent else values[send.origin]
            values[send.arrival] = jax.device_put(piece, SingleDeviceSharding(send.to))
