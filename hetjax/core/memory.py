"""How much memory a run takes on each device, from the compiled programs; checked before any data are loaded."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hetjax.core import processes
from hetjax.core.stage import Stage
from hetjax.core.tasks import StageKey
from hetjax.core.trainer import Trainer


class DeviceMemory(NamedTuple):
    """Bytes on one device. `workspace`: of the largest program that runs there."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # of the microbatches in flight
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def estimate(trainer: Trainer) -> dict[int, DeviceMemory]:
    """Memory by position of this process's devices. Needs compiled programs."""

    def of_stage(key: StageKey, stage: Stage) -> DeviceMemory:
        kept = local_bytes(stage.kept)
        # of what a program puts out, that which is counted as activations or weights
        counted = {"forward": kept, "cast": local_bytes(stage.parameters.copies)}
        workspace = max(
            (
                m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes - counted.get(name, 0)
                for name, m in stage.memory.items()
            ),
            default=0,
        )
        return held(stage, trainer.pipeline.schedule.max_in_flight[key], kept, workspace)

    mine = {n for n, device in enumerate(trainer.spec.devices) if processes.is_mine(device)}
    return {n: memory for n, memory in by_device(trainer, of_stage).items() if n in mine}


def by_device(trainer: Trainer, of_stage: Callable[[StageKey, Stage], DeviceMemory]) -> dict[int, DeviceMemory]:
    """Memory by device position, from that of each stage on each of its devices."""
    devices: dict[int, DeviceMemory] = {}
    for key, stage in trainer.pipeline.stages.items():
        mine = of_stage(key, stage)
        for device in stage.plan.device_ids:
            have = devices.get(device, DeviceMemory(0, 0, 0, 0, 0))
            added = DeviceMemory(*(a + b for a, b in zip(have, mine, strict=True)))
            devices[device] = added._replace(workspace=max(have.workspace, mine.workspace))
    return devices


def held(stage: Stage, in_flight: int, kept: int, workspace: int) -> DeviceMemory:
    """What a stage takes on each of its devices with residuals of `kept` bytes for a microbatch."""
    mine = stage.parameters
    return DeviceMemory(
        local_bytes((mine.params, mine.copies, mine.lent_to_it)),
        local_bytes(mine.state),
        local_bytes(mine.acc) if mine.trains else 0,
        max(in_flight, 1) * (local_bytes((stage.x, stage.packed)) + kept),
        workspace,
    )


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def table(devices: dict[int, DeviceMemory]) -> str:
    """One line per device, in MiB."""
    lines = ["device  weights  optimizer  gradients  activations  workspace  total (MiB)"]
    for device, memory in sorted(devices.items()):
        mib = [f"{n / 2**20:.1f}" for n in (*memory, memory.total)]
        widths = (7, 9, 9, 11, 9, 5)
        lines.append(f"{device:<6}  " + "  ".join(text.rjust(w) for text, w in zip(mib, widths, strict=True)))
    return "\n".join(lines)


def check(devices: dict[int, DeviceMemory], available: dict[int, int]) -> None:
    """Raises ValueError for the first device that needs more than the bytes it has."""
    for device, memory in sorted(devices.items()):
        if device in available and memory.total > available[device]:
            raise ValueError(
                f"device {device}: the run needs {memory.total / 2**30:.2f} GiB, the device has "
                f"{available[device] / 2**30:.2f} GiB; use fewer samples a group, remat='full', or more devices"
            )


def available(devices: list[jax.Device]) -> dict[int, int]:
    """Bytes of each device; emulated CPU devices share the machine's memory in equal parts. Those of other processes
    are taken to be like this one's first."""
    found = {}
    for position, device in enumerate(devices):
        stats = (device if processes.is_mine(device) else jax.local_devices()[0]).memory_stats() or {}
        if "bytes_limit" in stats:
            found[position] = stats["bytes_limit"]
        elif device.platform == "cpu":
            found[position] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return found
