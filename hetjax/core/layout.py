"""How a module is cut and where it stands, as its user writes it.

A stage's devices form a grid of four axes, outermost first:

    dp      the batch (samples, or an encoder's pictures) is cut
    copies  everything is repeated, which is what a homogeneous encoder does over the language model's cp
    cp      the sequence is cut
    tp      heads, feed-forward and vocabulary are cut

pp cuts a module's layers into stages, each on its own dp x copies x cp x tp consecutive devices of the placement. With
eight devices, dp=2, tp=2, pp=2:

    stage 0: devices 0 1 | 2 3      stage 1: devices 4 5 | 6 7      (tp inside, dp across the bar)

vpp deals pp x vpp stages to these devices in turn: with vpp=2 stage 2 stands where stage 0 does, and 3 where 1 does.
"""

import dataclasses
import re

import numpy as np

from hetjax.core.tasks import OFFLOADS
from models.context import CONTEXTS, GATHER

AXES = ("dp", "copies", "cp", "tp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one module is cut, and on which devices.

    `devices` are positions in `jax.devices()`: None (the first that it needs), a list, or text such as "0-3,6".
    `layers` is the number of layers of each pipeline stage; None cuts as evenly as it goes, the first ones larger.
    `vpp`: interleaved stages (arXiv:2104.04473), so many on the devices of each of pp, dealt round.
    `replicas`: an encoder stands so many times on consecutive devices, and each replica takes every so many-th
    microbatch, in the holes of the language model's pipeline.
    `ep`: experts are cut over so many of a stage's devices: those of tp or a part of them; if that is too few, those of
    cp or of the inner part of dp too. `sp`: sequence parallelism (arXiv:2205.05198): between the blocks of a layer the
    tokens are cut over tp. `context` is how attention reaches over cp: gather, ring or heads (`models/context.py`).
    `zero` (arXiv:1910.02054): what is cut over the data replicas: 1 the optimizer's state, 2 gradients too, 3 weights
    too. `zero_size`: over how many of dp, the inner ones (None: all); the others repeat the shards. `offload`: what is
    in the host's memory while it is not used: "parameters", "optimizer", "residuals", "boundaries" (`offload.py`).
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    replicas: int = 1
    copies: int = 1
    ep: int = 1
    sp: bool = False
    zero: int = 1
    zero_size: int | None = None
    devices: str | tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    context: str = GATHER
    offload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp", "pp", "vpp", "replicas", "copies", "ep"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Layout.{name}={value!r}; it must be a whole number of at least 1")
        if not isinstance(self.sp, bool):
            raise ValueError(f"Layout.sp={self.sp!r}; it must be True or False")
        if self.sp and self.tp == 1:
            raise ValueError("Layout.sp=True cuts the tokens over tp, and tp=1 cuts nothing; set sp=False, or more tp")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(
                f"Layout.vpp={self.vpp} deals stages to the devices of pp, and with pp=1 to the same ones each time; "
                "set vpp=1, or more pp"
            )
        if self.replicas > 1 and self.pp > 1:
            raise ValueError(
                f"Layout.replicas={self.replicas} with pp={self.pp}: a replica has all layers, on the devices of one "
                "stage of the language model; set pp=1, or replicas=1"
            )
        _ = self.expert_shares  # refuses what is no whole part
        if self.context not in CONTEXTS:
            raise ValueError(f"Layout.context={self.context!r}; it must be one of {', '.join(CONTEXTS)}")
        if self.context != GATHER and self.cp == 1:
            raise ValueError(
                f"Layout.context={self.context!r} with cp=1, where no sequence is cut; set cp, or leave context out"
            )
        self._check_zero()
        self._check_offload()
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

    def _check_offload(self) -> None:
        if not isinstance(self.offload, list | tuple):
            raise ValueError(f"Layout.offload={self.offload!r}; it must be a list, such as {list(OFFLOADS)}")
        object.__setattr__(self, "offload", tuple(self.offload))
        for kind in self.offload:
            if kind not in OFFLOADS:
                raise ValueError(f"Layout.offload has {kind!r}; it may have {', '.join(OFFLOADS)}")
            if self.offload.count(kind) > 1:
                raise ValueError(f"Layout.offload has {kind!r} {self.offload.count(kind)} times; name it once")

    @property
    def stage_size(self) -> int:
        """Devices of one pipeline stage."""
        return self.dp * self.copies * self.cp * self.tp

    @property
    def num_stages(self) -> int:
        """Ranges into which the layers are cut."""
        return self.pp * self.vpp

    @property
    def num_devices(self) -> int:
        """Devices of the module."""
        return self.stage_size * self.pp * self.replicas

    @property
    def device_ids(self) -> tuple[int, ...]:
        """Positions in `jax.devices()`, stage by stage, replica by replica."""
        if self.devices is None:
            return tuple(range(self.num_devices))
        return tuple(int(i) for i in self.devices)

    @property
    def expert_shares(self) -> dict[str, int]:
        """How much ep takes of tp, cp and dp, in this order. Raises ValueError where that is no whole part."""
        shares, left = {}, self.ep
        for name in ("tp", "cp", "dp"):
            size = getattr(self, name)
            shares[name] = left if size % left == 0 else size
            if left % shares[name]:
                raise ValueError(
                    f"Layout.ep={self.ep} takes its devices from tp={self.tp}, then cp={self.cp}, then dp={self.dp}, "
                    f"and of {name} it would take {left} of {size}; make one a multiple of the other"
                )
            left //= shares[name]
        if left > 1:
            raise ValueError(f"Layout.ep={self.ep} is more than tp x cp x dp = {self.ep // left}; make it smaller")
        return shares

    def __str__(self) -> str:
        sizes = [f"{n}={getattr(self, n)}" for n in (*AXES, "pp", "vpp", "replicas", "ep") if getattr(self, n) > 1]
        sizes += ["sp"] * self.sp + [f"zero={self.zero}"] * (self.zero > 1)
        sizes += [f"zero_size={self.zero_size}"] * (self.zero_size is not None)
        named = {"context": "" if self.context == GATHER else self.context, "offload": " and ".join(self.offload)}
        return ", ".join([" x ".join(sizes) or "dp=1", *(f"{name}={said}" for name, said in named.items() if said)])


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
    ways = layout.cp * layout.expert_shares["tp"]
    if is_sink and layout.ep > 1 and seq % ways:
        raise ValueError(
            f"{name}: ep={layout.ep} cuts the tokens of experts over {ways} devices of cp and tp, which do not divide "
            f"seq_len={seq}; make seq_len a multiple of {ways}, or ep smaller"
        )
    share = layout.expert_shares["tp"]
    if not is_sink and layout.ep > 1 and not layout.sp and items // layout.dp % share:
        raise ValueError(
            f"{name}: ep={layout.ep} cuts the items of each data replica over {share} devices of tp, which do not "
            f"divide the {items // layout.dp} that it has; make slots_per_group a multiple of {share}, or set sp=True"
        )
    if is_sink and layout.sp and seq % (layout.cp * layout.tp):
        raise ValueError(
            f"{name}: sp=True cuts the sequence over cp x tp = {layout.cp * layout.tp} devices, which do not divide "
            f"seq_len={seq}; make seq_len a multiple of that, or set sp=False"
        )


def check_replicas(name: str, layout: Layout, *, is_sink: bool, num_microbatches: int) -> None:
    """Raises ValueError unless each replica of a module has a share of a step's microbatches."""
    if is_sink and layout.replicas > 1:
        raise ValueError(
            f"{name}: replicas={layout.replicas}, but it is encoders whose replicas work in the pipeline of the "
            "language model; set replicas=1, and more dp"
        )
    if layout.replicas > num_microbatches:
        raise ValueError(
            f"{name}: replicas={layout.replicas} share the microbatches of a step, of which there are "
            f"num_microbatches={num_microbatches}; set as many of these, or fewer replicas"
        )


def zigzag(seq: int, cp: int) -> np.ndarray:
    """The order of positions that gives cp contiguous shards equal causal work: shard r gets chunks r and 2cp-1-r."""
    chunks = np.arange(seq).reshape(2 * cp, -1)
    return np.concatenate([chunks[[r, 2 * cp - 1 - r]].reshape(-1) for r in range(cp)])
