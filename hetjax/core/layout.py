"""Where a module stands and how it is cut: layouts, placement, stages. The only file that builds a mesh.

A stage's devices form a grid of four axes, outermost first:

    dp      the batch (samples, or an encoder's pictures) is cut
    copies  everything is repeated, which is what a homogeneous encoder does over the language model's cp
    cp      the sequence is cut
    tp      heads, feed-forward and vocabulary are cut

pp cuts a module's layers into stages, each on its own dp x copies x cp x tp consecutive devices of the placement. With
eight devices, dp=2, tp=2, pp=2:

    stage 0: devices 0 1 | 2 3      stage 1: devices 4 5 | 6 7      (tp inside, dp across the bar)
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hetjax.core.mesh import Grid, fold, innermost
from models.axes import Axes
from models.contract import ModuleDef

AXES = ("dp", "copies", "cp", "tp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one module is cut, and on which devices.

    `devices` are positions in `jax.devices()`: None (the first that it needs), a list, or text such as "0-3,6".
    `layers` is the number of layers of each pipeline stage; None cuts as evenly as it goes, the first ones larger.
    `sp`: sequence parallelism (arXiv:2205.05198): between the blocks of a layer the tokens are cut over tp.
    `zero` (arXiv:1910.02054): what is cut over the data replicas: 1 the optimizer's state, 2 gradients too, 3 weights
    too. `zero_size`: over how many of dp, the inner ones (None: all); the others repeat the shards.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    copies: int = 1
    sp: bool = False
    zero: int = 1
    zero_size: int | None = None
    devices: str | tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp", "pp", "copies"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Layout.{name}={value!r}; it must be a whole number of at least 1")
        if self.sp and self.tp == 1:
            raise ValueError("Layout.sp=True cuts the tokens over tp, and tp=1 cuts nothing; set sp=False, or more tp")
        self._check_zero()
        if isinstance(self.devices, str):
            object.__setattr__(self, "devices", _parse_devices(self.devices))
        elif self.devices is not None:
            object.__setattr__(self, "devices", tuple(self.devices))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def _check_zero(self) -> None:
        if self.zero not in (1, 2, 3) or isinstance(self.zero, bool):
            raise ValueError(f"Layout.zero={self.zero!r}; it must be 1, 2 or 3, a stage of ZeRO")
        size = self.dp if self.zero_size is None else self.zero_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or self.dp % size:
            fits = ", ".join(str(n) for n in range(1, self.dp + 1) if self.dp % n == 0)
            raise ValueError(f"Layout.zero_size={size!r} is no part of dp={self.dp}; use {fits}, or None for all of dp")
        if self.zero > 1 and size * self.cp == 1 and not self.sp:
            raise ValueError(
                f"Layout.zero={self.zero} cuts over the data replicas, of which there is one (dp={self.dp}, "
                f"zero_size={self.zero_size}, cp={self.cp}); set zero=1, or more of them"
            )

    @property
    def stage_size(self) -> int:
        """Devices of one pipeline stage."""
        return self.dp * self.copies * self.cp * self.tp

    @property
    def num_devices(self) -> int:
        """Devices of the module."""
        return self.stage_size * self.pp

    @property
    def device_ids(self) -> tuple[int, ...]:
        """Positions in `jax.devices()`, stage by stage."""
        if self.devices is None:
            return tuple(range(self.num_devices))
        return tuple(int(i) for i in self.devices)

    def __str__(self) -> str:
        sizes = [f"{n}={getattr(self, n)}" for n in ("dp", "copies", "cp", "tp", "pp") if getattr(self, n) > 1]
        sizes += ["sp"] * self.sp + [f"zero={self.zero}"] * (self.zero > 1)
        sizes += [f"zero_size={self.zero_size}"] * (self.zero_size is not None)
        return " x ".join(sizes) or "dp=1"


def like(layout: Layout) -> Layout:
    """The homogeneous layout of an encoder: the devices, dp and tp of `layout`'s first stage, repeated over its cp."""
    return Layout(
        dp=layout.dp,
        tp=layout.tp,
        copies=layout.copies * layout.cp,
        devices=layout.device_ids[: layout.stage_size],
    )


def _parse_devices(text: str) -> tuple[int, ...]:
    ids: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"Layout.devices={text!r}: {part!r} is neither a number nor a range; write '0-3,6'")
        start, stop = int(match[1]), int(match[2] or match[1])
        if stop < start:
            raise ValueError(
                f"Layout.devices={text!r}: the range {part.strip()!r} runs backwards; write '{stop}-{start}'"
            )
        ids += range(start, stop + 1)
    return tuple(ids)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One pipeline stage of a module: layers `lo` to `hi` on the mesh of `grid`."""

    module: str
    index: int
    num_stages: int
    lo: int
    hi: int
    grid: Grid
    device_ids: tuple[int, ...]

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
    counts = _layer_counts(name, definition.num_layers, layout)
    plans = []
    for index in range(layout.pp):
        ids = layout.device_ids[index * layout.stage_size : (index + 1) * layout.stage_size]
        grid = make_grid(layout, [devices[i] for i in ids])
        lo = sum(counts[:index])
        plans.append(StagePlan(name, index, layout.pp, lo, lo + counts[index], grid, ids))
    return plans


def make_grid(layout: Layout, devices: Sequence[jax.Device]) -> Grid:
    """The mesh of one stage of a layout on these devices."""
    inner = {"dp": [layout.zero_size or layout.dp]}
    folded = {name: fold(name, getattr(layout, name), inner.get(name, ())) for name in AXES}
    parts = {name: tuple(axes) for name, axes in folded.items()}
    parts["sp"] = parts["tp"] if layout.sp else ()
    repeated = 0 if layout.zero_size is None else len(parts["dp"]) - len(innermost(folded["dp"], layout.zero_size))
    parts["across"] = parts["dp"][:repeated]
    sizes = {axis: size for axes in folded.values() for axis, size in axes.items()}
    mesh = Mesh(np.array(devices).reshape(list(sizes.values())), tuple(sizes))
    return Grid(mesh, parts, layout.zero)


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
                "use fewer devices, or emulate more (emulated_devices)"
            )


def _check_module(name: str, definition: ModuleDef, layout: Layout) -> None:
    for axis in ("dp", "copies", "cp", "tp", "pp"):
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
        size = 1 if axis == "sp" else getattr(layout, axis)
        for what, count in counts.items():
            if count % size:
                fits = [str(n) for n in range(1, count + 1) if count % n == 0]
                raise ValueError(
                    f"{name}: {axis}={size} does not divide {what}={count}; use {axis} of {', '.join(fits[:8])}"
                )


def _layer_counts(name: str, num_layers: int, layout: Layout) -> tuple[int, ...]:
    if layout.pp > num_layers:
        raise ValueError(f"{name}: pp={layout.pp} stages for {num_layers} layers; use pp of at most {num_layers}")
    if layout.layers is None:
        return tuple(num_layers // layout.pp + (i < num_layers % layout.pp) for i in range(layout.pp))
    if len(layout.layers) != layout.pp or sum(layout.layers) != num_layers or min(layout.layers) < 1:
        raise ValueError(
            f"{name}: Layout.layers={list(layout.layers)} must be pp={layout.pp} counts of at least 1 that add up to "
            f"{num_layers} layers"
        )
    return layout.layers


def check_batch(name: str, layout: Layout, *, is_sink: bool, groups: int, items: int, seq: int) -> None:
    """Raises ValueError unless a module's layout divides the microbatch.

    `groups` of samples, `items` slots of this encoder in the microbatch (0 for the sink), `seq` tokens a row.
    """
    if is_sink and groups % layout.dp:
        raise ValueError(
            f"{name}: dp={layout.dp} does not divide the microbatch's groups={groups}; set groups to a multiple of "
            f"{layout.dp}, or dp to a divisor of {groups}"
        )
    if not is_sink and items % layout.dp:
        raise ValueError(
            f"{name}: dp={layout.dp} does not divide the microbatch's {items} item slots (groups x slots_per_group); "
            f"make them a multiple of {layout.dp}"
        )
    if is_sink and layout.cp > 1 and seq % (2 * layout.cp):
        raise ValueError(
            f"{name}: cp={layout.cp} cuts the sequence into {2 * layout.cp} chunks (zig-zag), which do not divide "
            f"seq_len={seq}; make seq_len a multiple of {2 * layout.cp}"
        )
    if is_sink and layout.sp and seq % (layout.cp * layout.tp):
        raise ValueError(
            f"{name}: sp=True cuts the sequence over cp x tp = {layout.cp * layout.tp} devices, which do not divide "
            f"seq_len={seq}; make seq_len a multiple of that, or set sp=False"
        )


def zigzag(seq: int, cp: int) -> np.ndarray:
    """The order of positions that gives cp contiguous shards equal causal work: shard r gets chunks r and 2cp-1-r."""
    chunks = np.arange(seq).reshape(2 * cp, -1)
    return np.concatenate([chunks[[r, 2 * cp - 1 - r]].reshape(-1) for r in range(cp)])


def picture(stages: Sequence[StagePlan], num_devices: int) -> str:
    """A table: which device holds which part of which module."""
    modules = list(dict.fromkeys(s.module for s in stages))
    cells = {(i, m): "" for i in range(num_devices) for m in modules}
    for stage in stages:
        held = f"layers {stage.lo}-{stage.hi - 1}" if stage.hi > stage.lo + 1 else f"layer {stage.lo}"
        sizes = {axis: stage.grid.size(stage.grid.parts[axis]) for axis in AXES}
        for place, device in zip(np.ndindex(*sizes.values()), stage.device_ids, strict=True):
            part = [f"{a}{i}" for a, i in zip(AXES, place, strict=True) if sizes[a] > 1]
            cells[device, stage.module] = " ".join([held, *part])
    rows = [["device", *modules], *[[str(i), *(cells[i, m] or "-" for m in modules)] for i in range(num_devices)]]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
