"""How much memory a run takes on each device, from the compiled programs; checked before any data are loaded."""

import collections
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from hetjax.core import processes
from hetjax.core.pipeline import Pipeline
from hetjax.core.stage import Stage
from hetjax.core.tasks import OF_STAGES, Kind, StageKey, Thing, What
from hetjax.core.trainer import Trainer


class DeviceMemory(NamedTuple):
    """Bytes on one device, at the moment of a step at which they are most. `workspace`: of the program that runs.

    `host`: the most pinned memory of the host that the device's things take."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # of the microbatches in flight
    workspace: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it on the device."""
        return sum(self) - self.host


Counts = Collection[tuple[Thing, int]]
COLUMNS = {
    What.WEIGHTS: "weights",
    What.MASTERS: "weights",
    What.STATE: "optimizer",
    What.RESIDUALS: "activations",
    What.INPUTS: "activations",
    What.COTANGENTS: "activations",
    What.PAIRS: "activations",
    What.SUMS: "gradients",
}
ADD = "add"  # the program that adds a copy's gradients, which have come beside them, to the owner's
BETWEEN = {  # programs that run between steps, and what of their stage they are given
    "cast": (What.WEIGHTS, What.MASTERS),
    "copy": (What.WEIGHTS, What.MASTERS, What.STATE),
    "evaluate": (What.WEIGHTS,),
}


def estimate(trainer: Trainer) -> dict[int, DeviceMemory]:
    """Memory by position of this process's devices. Needs compiled programs."""
    stages = trainer.pipeline.stages
    workspace = {(key, name): _workspace(stage, name) for key, stage in stages.items() for name in stage.memory}
    workspace |= {(key, ADD): local_bytes(trainer.finish.lent(key)) for key in trainer.finish.owners}
    found = of_step(trainer.pipeline, {key: local_bytes(stage.kept) for key, stage in stages.items()}, workspace)
    own = processes.own(trainer.spec.devices)
    return {n: memory for n, memory in found.items() if n in own}


def _workspace(stage: Stage, name: str) -> int:
    """What a program takes beside what is counted of what it is given and puts out."""
    found, mine = stage.memory[name], stage.parameters
    counted = {
        "forward": local_bytes(stage.kept),
        "backward": local_bytes(stage.pairs),
        "cast": local_bytes(mine.copies),
    }
    if name == "reduce":
        counted["reduce"] = local_bytes(mine.repeated(mine.grads))
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes - counted.get(name, 0)


def of_step(
    pipeline: Pipeline, kept: Mapping[StageKey, int], workspace: Mapping[tuple[StageKey, str], int]
) -> dict[int, DeviceMemory]:
    """Memory by device position with residuals of so many bytes for a microbatch and programs of such a workspace."""
    sizes = {thing: n for key in pipeline.stages for thing, n in things(pipeline, key, kept[key]).items()}
    devices = {key: set(stage.plan.device_ids) for key, stage in pipeline.stages.items()}
    gradients: collections.Counter[int] = collections.Counter()
    for key, stage in pipeline.stages.items():
        if stage.parameters.trains:
            gradients.update(dict.fromkeys(devices[key], local_bytes(stage.parameters.acc)))
    found: dict[int, DeviceMemory] = {}
    host: collections.Counter[int] = collections.Counter()
    for key, program, there, away in _moments(pipeline):
        for device in devices[key]:
            columns = dict.fromkeys(DeviceMemory._fields, 0)
            columns["workspace"] = workspace.get((key, program), 0)
            columns["gradients"] = gradients[device]
            for thing, count in there:
                columns[COLUMNS[thing.what]] += count * sizes[thing] * (device in devices[thing.stage])
            now = DeviceMemory(**columns)
            found[device] = max(found.get(device, now), now, key=lambda memory: memory.total)
            in_host = sum(count * sizes[thing] for thing, count in away if device in devices[thing.stage])
            host[device] = max(host[device], in_host)
    return {device: memory._replace(host=host[device]) for device, memory in found.items()}


def _moments(pipeline: Pipeline) -> Iterator[tuple[StageKey, str, Counts, Counts]]:
    """(stage, program, what is on the devices, what is on the host) of every program that may run."""
    for moment in pipeline.schedule.moments:
        yield moment.stage, moment.kind.name.lower(), moment.device, moment.host
        if moment.kind in (Kind.REDUCE, Kind.MEASURE):
            yield moment.stage, ADD, moment.device, moment.host
    home = pipeline.schedule.home
    stay = {Thing(what, key) for key in pipeline.stages for what in OF_STAGES} - home
    for key in pipeline.stages:
        for program, given in BETWEEN.items():
            there = stay | {Thing(what, key) for what in given}
            yield key, program, [(thing, 1) for thing in there], [(thing, 1) for thing in home]


def things(pipeline: Pipeline, key: StageKey, kept: int) -> dict[Thing, int]:
    """Bytes on each of a stage's devices of what it holds, of one microbatch, with residuals of `kept` bytes."""
    stage = pipeline.stages[key]
    mine = stage.parameters
    found = {
        Thing(What.WEIGHTS, key): local_bytes(mine.weights),
        Thing(What.MASTERS, key): local_bytes(mine.masters(mine.params)),
        Thing(What.STATE, key): local_bytes(mine.state),
        Thing(What.RESIDUALS, key): local_bytes(stage.packed) + kept,
        Thing(What.SUMS, key): local_bytes(mine.repeated(mine.grads)) if mine.trains else 0,
    }
    if stage.splits:
        found[Thing(What.PAIRS, key)] = local_bytes(stage.pairs)
    for link in pipeline.links[key]:
        of_link = local_bytes([link.boundary.source[k] for k in link.boundary.gradients])
        found[Thing(What.COTANGENTS, key, -1, link.target)] = of_link
    for link in pipeline.sources[key]:
        found[Thing(What.INPUTS, key, -1, link.source)] = local_bytes([stage.x[name] for name in link.names.values()])
    return found


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def table(devices: dict[int, DeviceMemory]) -> str:
    """One line per device, in MiB."""
    lines = ["device  weights  optimizer  gradients  activations  workspace  total    host (MiB)"]
    for device, memory in sorted(devices.items()):
        mib = [f"{n / 2**20:.1f}" for n in (*memory[:-1], memory.total, memory.host)]
        widths = (7, 9, 9, 11, 9, 5, 6)
        lines.append(f"{device:<6}  " + "  ".join(text.rjust(w) for text, w in zip(mib, widths, strict=True)))
    return "\n".join(lines)


def check(devices: dict[int, DeviceMemory], available: dict[int, int]) -> None:
    """Raises ValueError for the first device that needs more than the bytes it has."""
    for device, memory in sorted(devices.items()):
        if device in available and memory.total > available[device]:
            raise ValueError(
                f"device {device}: the run needs {memory.total / 2**30:.2f} GiB, the device has "
                f"{available[device] / 2**30:.2f} GiB; use fewer samples a group, remat='full', Layout.offload, or "
                "more devices"
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
