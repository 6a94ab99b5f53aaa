"""The stages of a module: which layers stand on which devices, and what is refused before anything compiles."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hetjax.core.layout import AXES, Layout
from hetjax.core.mesh import Grid, make_grid
from hetjax.core.tasks import Share, StageKey
from models.axes import Axes
from models.context import GATHER, HEADS, RING
from models.contract import ModuleDef


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One pipeline stage of a module: layers `lo` to `hi` on the mesh of `grid`; of a module with several replicas the
    only one of its replica, with that `share` of the microbatches."""

    module: str
    index: int
    num_stages: int
    lo: int
    hi: int
    grid: Grid
    device_ids: tuple[int, ...]
    share: Share

    @property
    def key(self) -> StageKey:
        """Its name: of several replicas the number is the replica's."""
        return self.module, self.index + self.share.replica

    @property
    def first(self) -> bool:
        """Whether the stage holds the module's `first` part."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether the stage holds the module's `last` part."""
        return self.index == self.num_stages - 1

    @property
    def axes(self) -> Axes:
        """What the module's code sees of the mesh."""
        return self.grid.axes

    @property
    def mesh(self) -> Mesh:
        """Its devices."""
        return self.grid.mesh


def plan_stages(name: str, definition: ModuleDef, layout: Layout, devices: Sequence[jax.Device]) -> list[StagePlan]:
    """The stages of a module. Raises ValueError, before anything compiles, for a layout that the module cannot have."""
    _check_devices(name, layout, len(devices))
    _check_module(name, definition, layout)
    _check_context(name, definition, layout)
    counts = _layer_counts(name, definition.num_layers, layout)
    plans = []
    for replica, (index, count) in itertools.product(range(layout.replicas), enumerate(counts)):
        place = replica + index % layout.pp
        ids = layout.device_ids[place * layout.stage_size : (place + 1) * layout.stage_size]
        try:
            grid = make_grid(layout, [devices[i] for i in ids], kv_heads=_kv_heads(definition))
        except ValueError as error:
            raise ValueError(f"{name}: {layout}: {error}; change ep, or tp") from None
        lo, share = sum(counts[:index]), Share(replica, layout.replicas)
        plans.append(StagePlan(name, index, layout.num_stages, lo, lo + count, grid, ids, share))
    return plans


def _kv_heads(definition: ModuleDef) -> int:
    return definition.divisible.get("kv", {}).get("kv_heads", 0)


def _check_devices(name: str, layout: Layout, available: int) -> None:
    ids, needed = layout.device_ids, layout.num_devices
    if len(ids) != needed:
        raise ValueError(
            f"{name}: {layout} needs {needed} devices, Layout.devices names {len(ids)}; name {needed}, "
            "or change the layout"
        )
    for i in ids:
        if ids.count(i) > 1:
            raise ValueError(f"{name}: Layout.devices names device {i} {ids.count(i)} times; name each device once")
        if not 0 <= i < available:
            raise ValueError(
                f"{name}: {layout} stands on device {i}, but there are {available} (0 to {available - 1}); "
                "use fewer devices, or emulate more (emulated_devices; under hetjax launch --devices-per-process)"
            )


def _check_module(name: str, definition: ModuleDef, layout: Layout) -> None:
    if layout.ep > 1 and "ep" not in definition.axes:
        raise ValueError(f"{name}: ep={layout.ep} cuts experts, and the model has none; set ep=1")
    for axis in (*AXES, "pp"):
        if getattr(layout, axis) > 1 and axis not in definition.axes:
            raise ValueError(
                f"{name}: {axis}={getattr(layout, axis)}, but the model's code does not handle {axis} "
                f"(it handles {', '.join(sorted(definition.axes))}); set {axis}=1"
            )
    if layout.sp and "sp" not in definition.axes:
        raise ValueError(f"{name}: sp=True, but the model's tokens cannot be cut over tp; set sp=False")
    for what, count in definition.divisible.get("sp", {}).items():
        if layout.sp and count % (layout.cp * layout.tp):
            raise ValueError(
                f"{name}: sp=True cuts {what}={count} over cp x tp = {layout.cp * layout.tp} devices, which do not "
                "divide them; set sp=False, or make cp or tp smaller"
            )
    for axis, counts in definition.divisible.items():
        size = 1 if axis in ("sp", "kv") else getattr(layout, axis)
        for what, count in counts.items():
            if count % size:
                fits = [str(n) for n in range(1, count + 1) if count % n == 0]
                raise ValueError(
                    f"{name}: {axis}={size} does not divide {what}={count}; use {axis} of {', '.join(fits[:8])}"
                )
    kv = _kv_heads(definition)
    if kv and kv % layout.tp and layout.tp % kv:
        fits = [str(n) for n in range(1, 2 * kv + 1) if kv % n == 0 or n % kv == 0]
        raise ValueError(
            f"{name}: of tp={layout.tp} and kv_heads={kv} neither divides the other; use tp of {', '.join(fits[:8])}"
        )


def _check_context(name: str, definition: ModuleDef, layout: Layout) -> None:
    if layout.context == GATHER:
        return
    if not definition.heads:
        raise ValueError(
            f"{name}: context={layout.context!r}, but the model's code reaches over cp in its own way; "
            "leave context out"
        )
    mine = definition.heads // layout.tp
    if layout.context == HEADS and mine % layout.cp:
        fits = [str(n) for n in range(1, mine + 1) if mine % n == 0]
        raise ValueError(
            f"{name}: context={layout.context!r} cuts heads over cp, and cp={layout.cp} does not divide the {mine} of "
            f"heads={definition.heads} that tp={layout.tp} leaves a device; use cp of {', '.join(fits[:8])}, or "
            f"context={RING!r}"
        )


def _layer_counts(name: str, num_layers: int, layout: Layout) -> tuple[int, ...]:
    stages, said, setting = layout.num_stages, f"pp={layout.pp}", "pp"
    if layout.vpp > 1:
        said, setting = f"pp={layout.pp} x vpp={layout.vpp} = {stages}", "pp x vpp"
    if stages > num_layers:
        raise ValueError(f"{name}: {said} stages for {num_layers} layers; use {setting} of at most {num_layers}")
    if layout.layers is None:
        return tuple(num_layers // stages + (i < num_layers % stages) for i in range(stages))
    if len(layout.layers) != stages or sum(layout.layers) != num_layers or min(layout.layers) < 1:
        raise ValueError(
            f"{name}: Layout.layers={list(layout.layers)} must be {said} counts of at least 1 that add up to "
            f"{num_layers} layers"
        )
    return layout.layers


def picture(stages: Sequence[StagePlan], num_devices: int) -> str:
    """A table: which device holds which part of which module."""
    modules = list(dict.fromkeys(s.module for s in stages))
    cells = {(i, m): "" for i in range(num_devices) for m in modules}
    ranges: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for stage in stages:
        of_stage = f"{stage.lo}-{stage.hi - 1}" if stage.hi > stage.lo + 1 else f"{stage.lo}"
        ranges.setdefault((stage.module, stage.device_ids), []).append(of_stage)
    for stage in stages:
        held = ",".join(ranges[stage.module, stage.device_ids])
        held = f"layer {held}" if held.isdigit() else f"layers {held}"
        held += f" replica{stage.share.replica}" * (stage.share.replicas > 1)
        sizes = {axis: stage.grid.size(stage.grid.parts[axis]) for axis in AXES}
        for place, device in zip(np.ndindex(*sizes.values()), stage.device_ids, strict=True):
            part = [f"{a}{i}" for a, i in zip(AXES, place, strict=True) if sizes[a] > 1]
            cells[device, stage.module] = " ".join([held, *part])
    rows = [["device", *modules], *[[str(i), *(cells[i, m] or "-" for m in modules)] for i in range(num_devices)]]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
