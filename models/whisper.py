"""Whisper's encoder (arXiv:2212.04356) with a projector, in the two shapes that published models use.

whisper: every position of the context attends to every other, and each is a row. qwen2_audio (arXiv:2407.10759): a
clip's positions attend to its own alone, pairs of them are averaged before the last norm, and a clip has as many rows
as it has pairs. Its rows therefore do not depend on the length of the context, which may be cut to what the clips need.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.axes import Axes
from models.context import prepared
from models.contract import Batch, ModuleDef
from models.encoder_layer import Attention, Mlp
from models.layers import LayerNorm, add, check_counts, dot, exact_gelu, normal, own, zeros
from models.nnx_parts import part
from models.projector import Linear, Projector
from models.recompute import keeps_arguments
from models.sight import Sight
from models.weight import Use

Carry = dict[str, jax.Array]
VARIANTS, PROJECTORS = ("whisper", "qwen2_audio"), ("linear", "mlp")
CARRY_DIMS = ("items", "stream", None)
EPS = 1e-5  # what the norms add to the variance


@dataclasses.dataclass(frozen=True)
class Whisper:
    """Sizes and variant of an audio encoder, and of the projector behind it. A frame of log-mel features is 10 ms."""

    num_mels: int  # bins of a frame: 80, or 128
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    output_width: int  # the language model's width
    variant: str = "whisper"  # whisper or qwen2_audio
    num_positions: int = 1500  # of the table, of two frames each: 30 s
    max_frames: int | None = None  # of the context, the longest clip; None: all positions
    projector: str = "linear"  # linear (Qwen2-Audio's), or mlp (LLaVA's, with a GELU between two)
    projector_width: int | None = None  # hidden features of projector="mlp"; None: output_width

    def __post_init__(self) -> None:
        counts = ("num_mels", "width", "num_layers", "num_heads", "mlp_width", "output_width", "num_positions")
        check_counts(self, *counts, *(n for n in ("max_frames", "projector_width") if getattr(self, n) is not None))
        for name, allowed in (("variant", VARIANTS), ("projector", PROJECTORS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Whisper.{name}={getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(f"Whisper.width={self.width} must be even and a multiple of num_heads={self.num_heads}")
        if self.projector == "linear" and self.projector_width is not None:
            raise ValueError(
                f"Whisper.projector_width={self.projector_width} with projector='linear', which has no hidden "
                "features; leave it out, or use projector='mlp'"
            )
        each = self.frames_per_row
        if self.context % each or not each <= self.context <= 2 * self.num_positions:
            name = "num_positions" if self.max_frames is None else "max_frames"
            raise ValueError(
                f"Whisper.{name}={getattr(self, name)}: the context must be a multiple of {each} frames for "
                f"variant={self.variant!r}, and at most the {2 * self.num_positions} that num_positions="
                f"{self.num_positions} reach"
            )

    @property
    def context(self) -> int:
        """Frames of the context."""
        return 2 * self.num_positions if self.max_frames is None else self.max_frames

    @property
    def frames_per_row(self) -> int:
        """Frames that become one row."""
        return 2 if self.variant == "whisper" else 4

    @property
    def frames(self) -> int:
        """Frames that are read: behind a context that was cut, one more, into which the convolutions look."""
        return self.context + (self.context < 2 * self.num_positions)

    @property
    def positions(self) -> int:
        """Positions of the context."""
        return self.context // 2

    @property
    def rows(self) -> int:
        """Rows of the longest clip."""
        return self.context // self.frames_per_row

    def rows_of(self, frames: int) -> int:
        """Rows that the language model receives of a clip of `frames` frames."""
        return self.rows if self.variant == "whisper" else positions_of(frames) // 2

    @property
    def hidden(self) -> int | None:
        """Hidden features of the projector; None if it has none."""
        return None if self.projector == "linear" else self.projector_width or self.output_width

    def module(self, compute_dtype: Any, *, name: str = "audio") -> ModuleDef:
        """The encoder as the core sees it, reading `name`.mel [items, frames, mels] and, where clips are masked,
        `name`.frames [items], each clip's own; activations are in `compute_dtype`."""
        reads: dict[str, tuple[str | None, ...]] = {f"{name}.mel": ("items", None, None)}
        if self.variant == "qwen2_audio":
            reads[f"{name}.frames"] = ("items",)
        cut = {"heads": self.num_heads, "mlp": self.mlp_width}
        if self.hidden is not None:
            cut["projector"] = self.hidden
        return ModuleDef(
            first=part(lambda rngs: _First(self, jnp.dtype(compute_dtype), name, rngs=rngs)),
            layers=(part(lambda rngs: _Layer(self, rngs=rngs)),) * self.num_layers,
            last=part(lambda rngs: _Last(self, rngs=rngs)),
            prepare=functools.partial(_places, self, name),
            reads=reads,
            carry={"x": CARRY_DIMS},
            output={"x": CARRY_DIMS},
            config=self,
            compute_dtype=jnp.dtype(compute_dtype),
            divisible={"tp": cut, "cp": {"rows": self.rows}, "sp": {"rows": self.rows}},
            axes=frozenset({"dp", "pp", "copies", "tp", "cp", "sp"}),
            heads=self.num_heads,
            rows=self.rows,
            width=self.output_width,
        )


def positions_of(frames: Any) -> Any:
    """Positions that `frames` frames, a number or an array of them, take."""
    return (frames + 1) // 2


def sinusoids(count: int, width: int) -> np.ndarray:
    """Whisper's positions: sines, then cosines, of wavelengths from 2 pi to 20000 pi, float32 [count, width]."""
    frequencies = np.exp(-np.log(10000) / max(width // 2 - 1, 1) * np.arange(width // 2))
    angles = np.arange(count)[:, None] * frequencies[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class _First(nnx.Module):
    def __init__(self, config: Whisper, compute_dtype: jnp.dtype, name: str, *, rngs: nnx.Rngs) -> None:
        self.config, self.compute_dtype, self.name = config, compute_dtype, name
        m, d = config.num_mels, config.width
        self.conv1 = normal(rngs, (3, m, d), (None, None, None), (3 * m) ** -0.5, Use("mel"))
        self.conv1_bias = zeros((d,), (None,))
        self.conv2 = normal(rngs, (3, d, d), (None, None, None), (3 * d) ** -0.5, Use("conv1"))
        self.conv2_bias = zeros((d,), (None,))
        self.position = nnx.Param(jnp.asarray(sinusoids(config.num_positions, d)), logical=(None, None))

    def __call__(self, rows: Mapping[str, jax.Array], batch: Batch, axes: Axes) -> Carry:
        config = self.config

        @keeps_arguments
        def first(mel: jax.Array, w: jax.Array) -> jax.Array:
            behind = config.context + 1 - config.frames  # no zeros behind a cut
            mel = jnp.pad(mel.astype(self.compute_dtype), ((0, 0), (1, behind), (0, 0)))
            return dot(_triples(mel, config.context, 1), w, contract=2)

        @keeps_arguments
        def second(x: jax.Array, w: jax.Array) -> jax.Array:
            x = jnp.pad(exact_gelu(x), ((0, 0), (1, 0), (0, 0)))
            return dot(_triples(x, config.positions, 2), w, contract=2)

        x = add(first(batch[f"{self.name}.mel"], self.conv1.get_value()), self.conv1_bias.get_value())
        x = add(second(x, self.conv2.get_value()), self.conv2_bias.get_value())
        x = add(keeps_arguments(exact_gelu)(x), self.position.get_value()[: config.positions])
        return {"x": own(x, 1, axes.stream)}  # the convolutions ran whole on every device


def _triples(x: jax.Array, count: int, stride: int) -> jax.Array:
    """What a kernel of three sees of `x` [n, frames, features] at each of `count` places, [n, count, 3, features]."""
    return jnp.stack([x[:, i : i + stride * (count - 1) + 1 : stride] for i in range(3)], axis=2)


def _places(config: Whisper, name: str, batch: Batch, axes: Axes) -> Batch:
    """What the layers are given of a batch: where clips are masked, that a clip's own positions see each other and
    those behind it nothing."""
    if config.variant != "qwen2_audio":
        return {"sight": None}
    frames = batch[f"{name}.frames"]
    place = jnp.broadcast_to(jnp.arange(config.positions, dtype=jnp.int32), (len(frames), config.positions))
    real = (place < positions_of(frames)[:, None]).astype(jnp.int32)
    sight = Sight(own(place, 1, axes.cp), own(real, 1, axes.cp), place, real, causal=False)
    sight = prepared(sight, axes)
    return {"sight": jax.tree.map(axes.tp.vary, sight)}


class _Layer(nnx.Module):
    def __init__(self, config: Whisper, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = LayerNorm(config.width, EPS)
        self.attention = Attention(config.width, config.num_heads, key_bias=False, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, EPS)
        self.mlp = Mlp(config.width, config.mlp_width, exact_gelu, rngs=rngs)

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        x = carry["x"]
        x = x + self.attention(self.attention_norm(x), axes, batch["sight"])
        return {"x": x + self.mlp(self.mlp_norm(x), axes)}


class _Last(nnx.Module):
    def __init__(self, config: Whisper, *, rngs: nnx.Rngs) -> None:
        self.pooled = config.variant == "qwen2_audio"
        self.norm = LayerNorm(config.width, EPS)
        if config.hidden is None:
            self.projector = Linear(config.width, config.output_width, rngs=rngs)
        else:
            self.projector = Projector(config.width, config.hidden, config.output_width, rngs=rngs)

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        x = carry["x"]
        if self.pooled:
            n, positions, d = x.shape
            x = x.reshape(n, positions // 2, 2, d).mean(2)
        return {"x": self.projector(self.norm(x), axes)}
