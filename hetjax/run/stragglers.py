"""Names devices that compute more slowly than the others: one throttled GPU slows every stage that it is part of, and a
step's time does not say which.

Each process times one and the same product on each of its devices, while nothing else runs there: before the first
step, and behind each save.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from hetjax.core.trainer import Trainer
from hetjax.run import cluster

REPEATS = 5  # of which the shortest counts


class Form(NamedTuple):
    """Which product is timed: [width, width] with itself, so many times. `slow`: times the median that are told."""

    width: int
    times: int
    slow: float


ACCELERATOR = Form(4096, 16, 1.3)  # 2.2 TFLOP, some 3 ms of an H100
EMULATED = Form(128, 1, 5.0)  # devices that share their cores with others


class Stragglers:
    """Times the devices of a run; not those of a single process on a CPU, which share all of its cores."""

    def __init__(self, trainer: Trainer) -> None:
        devices = trainer.spec.devices
        emulated = devices[0].platform == "cpu"
        self._form = EMULATED if emulated else ACCELERATOR
        self._looks = not emulated or jax.process_count() > 1
        self._processes = {device.id: device.process_index for device in devices}
        self._stages = {key: stage.plan.device_ids for key, stage in trainer.pipeline.stages.items()}
        here = [d for d in devices if d.process_index == jax.process_index()] if self._looks else []
        self._products = {device.id: _product(self._form, device) for device in here}

    def look(self, step: int, awaited: object) -> None:
        """Prints which devices are slow behind a step, once the arrays of `awaited` are there. All processes call it
        alike."""
        if not self._looks:
            return
        jax.block_until_ready(awaited)
        said = cluster.tell_all(json.dumps({number: _seconds(run) for number, run in self._products.items()}))
        found = {int(number): seconds for of_one in said for number, seconds in json.loads(of_one).items()}
        for number, times in slow(found, self._form.slow).items():
            stages = ", ".join(f"{module}/{index}" for (module, index), ids in self._stages.items() if number in ids)
            print(
                f"behind step {step} device {number} (process {self._processes[number]}; {stages or 'no stage'}) took "
                f"{times:.1f} times as long for a product as the median of {len(found)}: it slows all that wait for it",
                flush=True,
            )


def slow(seconds: Mapping[int, float], limit: float) -> dict[int, float]:
    """How many times the median the devices take, by number, that take more than `limit` times."""
    median = statistics.median(seconds.values())
    return {number: each / median for number, each in sorted(seconds.items()) if each > limit * median}


def _product(form: Form, device: jax.Device) -> Callable[[], jax.Array]:
    where, dtype = SingleDeviceSharding(device), jnp.bfloat16 if form is ACCELERATOR else jnp.float32
    x = jnp.full((form.width, form.width), 1 / form.width, dtype, device=where)
    power = lambda x: jax.lax.fori_loop(0, form.times, lambda _, y: x @ y, x)
    compiled = jax.jit(power).lower(x).compile()
    return lambda: compiled(x)


def _seconds(run: Callable[[], jax.Array]) -> float:
    """Of the shortest of several runs, without the first, which wakes the device up."""
    found = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        run().block_until_ready()
        found.append(time.perf_counter() - start)
    return min(found[1:])
