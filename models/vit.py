"""A vision transformer with its projector, in the two shapes that published vision-language models use.

siglip: patches with a bias, tanh GELU. clip: a class token, a norm before the first layer, quick GELU, no patch bias.
The projector reads the hidden states that `feature_layer` names, side by side where it names several; layers behind the
last of them are not built, nor is the norm after the last layer, which no vision-language model reads. Of several, the
earlier ones travel beside the activations: a layer knows which it is by the depth that travels with them. Layers may
have experts in place of their MLP, as a decoder's: slots without a picture count for nothing there.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import moe
from models.axes import Axes, vary_like
from models.contract import Batch, ModuleDef, Part
from models.encoder_layer import Attention, Mlp
from models.layers import LayerNorm, add, check_counts, dot, normal, own, wide, zeros
from models.moe import COUNTED, ROUTING, Experts, Mixture
from models.nnx_parts import part
from models.projector import Projector
from models.recompute import keeps_arguments
from models.weight import Use

Carry = dict[str, jax.Array]
VARIANTS, SELECTS = ("siglip", "clip"), ("full", "default")
CARRY_DIMS = ("items", "stream", None)
DEPTH = "depth"  # carry key: how many layers `x` has passed, per token, for towers of which several layers are read


@dataclasses.dataclass(frozen=True)
class ViT:
    """Sizes and variant of a vision encoder, and of the projector behind it."""

    image_size: int  # pixels, of both sides; those that fill no patch are left out, on the right and below
    patch_size: int  # pixels, of both sides
    width: int
    num_layers: int  # of the whole tower, also those that feature_layer leaves out
    num_heads: int
    mlp_width: int
    output_width: int  # the language model's width
    variant: str = "siglip"  # siglip or clip
    projector_width: int | None = None  # hidden features of the projector; None: output_width
    feature_layer: int | tuple[int, ...] = -1  # hidden states to read; -1: after the last layer, 0: before the first
    select: str = "full"  # full: all tokens; default: without the first one, the class token of clip
    projector_bias: bool = True  # whether its two linear maps have biases
    experts: Experts | None = None  # in place of the MLPs, of which mlp_width is the width
    deepstack: tuple[int, ...] = ()  # further hidden states, each through a projector, for the llm's first layers

    def __post_init__(self) -> None:
        counts = ("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width", "output_width")
        check_counts(self, *counts, *(() if self.projector_width is None else ("projector_width",)))
        for name, allowed in (("variant", VARIANTS), ("select", SELECTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ViT.{name}={getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"ViT.image_size={self.image_size} holds no patch of patch_size={self.patch_size}; make it that or more"
            )
        if self.width % self.num_heads:
            raise ValueError(f"ViT.width={self.width} is not a multiple of num_heads={self.num_heads}; change either")
        layers = self._layers("feature_layer")
        if not layers:
            raise ValueError(
                "ViT.feature_layer=() names no hidden state, and the projector reads at least one; give it"
            )
        object.__setattr__(self, "feature_layer", layers if len(layers) > 1 else layers[0])
        object.__setattr__(self, "deepstack", self._layers("deepstack"))
        if self.experts is not None:
            self.experts.check_layers(self.num_layers, "ViT")
            if "moe" not in self.kinds:
                raise ValueError(
                    f"Experts.dense_layers={self.experts.dense_layers} leaves none of the {self.num_built} layers that "
                    f"ViT.feature_layer={self.feature_layer!r} needs; leave one out, or set ViT.experts to None"
                )

    def _layers(self, field: str) -> tuple[int, ...]:
        given: Any = getattr(self, field)
        layers = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not all(type(i) is int and -self.num_layers - 1 <= i <= self.num_layers for i in layers):
            raise ValueError(
                f"ViT.{field}={given!r}; it must be a number from -{self.num_layers + 1} to {self.num_layers}, or a "
                f"list of such (-1: after the last of num_layers={self.num_layers}, 0: before the first)"
            )
        return layers

    @property
    def has_class_token(self) -> bool:
        """Whether a learned token stands before the patches."""
        return self.variant == "clip"

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture inside the tower."""
        return self.num_patches + self.has_class_token

    @property
    def depths(self) -> tuple[int, ...]:
        """How many layers each of the hidden states that the projector reads has passed."""
        return self._passed(self.feature_layer if isinstance(self.feature_layer, tuple) else (self.feature_layer,))

    @property
    def deep(self) -> tuple[int, ...]:
        """How many layers each of the hidden states of `deepstack` has passed."""
        return self._passed(self.deepstack)

    def _passed(self, states: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i % (self.num_layers + 1) for i in states)

    @property
    def num_built(self) -> int:
        """Layers that are built: those that the features need, and at least one, which makes the module one."""
        return max(1, *self.depths, *self.deep)

    @property
    def kept(self) -> tuple[int, ...]:
        """Depths of the hidden states that later layers must carry along."""
        return tuple(sorted({*self.depths, *self.deep} - {self.num_built}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each layer that is built has behind its attention: "mlp" or "moe"."""
        dense = range(self.num_built) if self.experts is None else self.experts.dense_layers
        return tuple("mlp" if i in dense else "moe" for i in range(self.num_built))

    @property
    def rows(self) -> int:
        """Tokens of a picture that the language model receives."""
        return self.num_tokens - (self.select == "default")

    @property
    def eps(self) -> float:
        """What the norms add to the variance."""
        return 1e-5 if self.variant == "clip" else 1e-6

    @property
    def hidden(self) -> int:
        """Hidden features of the projector."""
        return self.projector_width or self.output_width

    def module(self, compute_dtype: Any, *, name: str = "vision") -> ModuleDef:
        """The encoder as the core sees it, reading `name`.pixels, with experts also `name`.used; activations are in
        `compute_dtype`."""
        # With a class token the tokens cannot be cut evenly: their number is odd for all usual sizes. Nor can those
        # that are left when the first one is dropped.
        layers = {kind: self._layer(kind) for kind in set(self.kinds)}
        hidden = {"heads": self.num_heads, "projector": self.hidden}
        hidden |= {"mlp": self.mlp_width} if "mlp" in layers else {}
        routed = moe.declare(self.experts)
        divisible = {"tp": hidden | routed.tp, "ep": routed.ep}
        whole = self.has_class_token or self.select == "default"
        cuts = {} if whole else {axis: {"tokens": self.num_tokens} for axis in ("cp", "sp")}
        beside = (*(_after(depth) for depth in self.kept), DEPTH) if self.kept else ()
        pixels, used = f"{name}.pixels", f"{name}.used"
        counts: dict[str, Any] = {}
        if self.experts is not None:
            counts["prepare"] = functools.partial(_counted, self, used, wide(compute_dtype))
        return ModuleDef(
            first=part(lambda rngs: _First(self, jnp.dtype(compute_dtype), pixels, rngs=rngs)),
            layers=tuple(layers[kind] for kind in self.kinds),
            last=part(lambda rngs: _Last(self, rngs=rngs)),
            reads={pixels: ("items", None, None, None)} | ({used: ("items",)} if counts else {}),
            **counts,
            carry=dict.fromkeys(("x", *beside), CARRY_DIMS) | routed.carry,
            output=dict.fromkeys(("x", *(f"deep{i}" for i in range(len(self.deep)))), CARRY_DIMS) | routed.output,
            config=self,
            compute_dtype=jnp.dtype(compute_dtype),
            divisible=divisible | cuts,
            axes=frozenset({"dp", "pp", "copies", "tp", *cuts, *(["ep"] if self.experts else [])}),
            bias_rate=routed.bias_rate,
            heads=self.num_heads,
            rows=self.rows,
            width=self.output_width,
        )

    def _layer(self, kind: str) -> Part:
        return part(lambda rngs: _Layer(self, kind, rngs=rngs))


class _First(nnx.Module):
    def __init__(self, config: ViT, compute_dtype: jnp.dtype, pixels: str, *, rngs: nnx.Rngs) -> None:
        self.config, self.compute_dtype, self.pixels = config, compute_dtype, pixels
        p, d = config.patch_size, config.width
        self.patch = normal(rngs, (p, p, 3, d), (None, None, None, None), (3 * p * p) ** -0.5, Use("patches"))
        self.position = normal(rngs, (config.num_tokens, d), (None, None), 0.02)
        if config.has_class_token:
            self.class_token = normal(rngs, (d,), (None,), 0.02)
            self.pre_norm = LayerNorm(d, config.eps)
        else:
            self.patch_bias = zeros((d,), (None,))

    def __call__(self, rows: Mapping[str, jax.Array], batch: Batch, axes: Axes) -> Carry:
        config = self.config

        @keeps_arguments
        def embed(pixels: jax.Array, w: jax.Array) -> jax.Array:
            patches = cut(pixels.astype(self.compute_dtype), config.patch_size)
            return dot(own(patches, 1, axes.stream), w, contract=3)

        x = embed(batch[self.pixels], self.patch.get_value())
        if config.has_class_token:
            token = jnp.broadcast_to(self.class_token.get_value().astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        else:
            x = add(x, self.patch_bias.get_value())
        x = add(x, own(self.position.get_value(), 0, axes.stream))
        x = self.pre_norm(x) if config.has_class_token else x
        carry = {"x": x}
        if config.experts is not None:
            carry[ROUTING] = moe.no_routing(config.experts, config.kinds.count("moe"), x)
        if not config.kept:
            return carry
        depth = vary_like(jnp.zeros((*x.shape[:-1], 1), jnp.float32), x)
        return carry | {DEPTH: depth} | {_after(d): x for d in config.kept}  # x until that layer


def _counted(config: ViT, used: str, dtype: Any, batch: Batch, axes: Axes) -> Batch:
    """What the layers are given of a batch: how much each token counts, of pictures and of slots without one."""
    real = jnp.broadcast_to(batch[used][:, None] > 0, (len(batch[used]), config.num_tokens // axes.cp.size))
    return {COUNTED: moe.count_tokens(real, axes, dtype)}


def _after(depth: int) -> str:
    """The carry key of the hidden state that has passed `depth` layers."""
    return f"after{depth}"


def cut(pixels: jax.Array, size: int) -> jax.Array:
    """Pictures [n, height, width, 3] as patches [n, patches, size, size, 3], row by row.

    The last pixels of a row or column that fill no patch are left out, as a "valid" convolution does."""
    n, height, width, channels = pixels.shape
    rows, columns = height // size, width // size
    grid = pixels[:, : rows * size, : columns * size].reshape(n, rows, size, columns, size, channels)
    return grid.swapaxes(2, 3).reshape(n, -1, size, size, channels)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


class _Layer(nnx.Module):
    def __init__(self, config: ViT, kind: str, *, rngs: nnx.Rngs) -> None:
        activation = quick_gelu if config.variant == "clip" else functools.partial(jax.nn.gelu, approximate=True)
        self.kept, self.kind = config.kept, kind
        self.attention_norm = LayerNorm(config.width, config.eps)
        self.attention = Attention(config.width, config.num_heads, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, config.eps)
        if kind == "moe":
            assert config.experts is not None
            self.moe = Mixture(config.experts, config.width, rngs=rngs)
        else:
            self.mlp = Mlp(config.width, config.mlp_width, activation, rngs=rngs)

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        x = carry["x"]
        x = x + self.attention(self.attention_norm(x), axes)
        y, behind = self.mlp_norm(x), dict(carry)
        if self.kind == "mlp":
            y = self.mlp(y, axes)
        else:
            y, row = self.moe(y, batch[COUNTED], axes)
            behind[ROUTING] = moe.appended(carry[ROUTING], row)
        x = x + y
        if not self.kept:
            return {**behind, "x": x}
        depth = carry[DEPTH] + 1
        states = {_after(d): jnp.where(depth == d, x, carry[_after(d)]) for d in self.kept}
        return {**behind, "x": x, DEPTH: depth, **states}


class _Last(nnx.Module):
    def __init__(self, config: ViT, *, rngs: nnx.Rngs) -> None:
        self.drop, self.experts = int(config.select == "default"), config.experts
        key = lambda depth: "x" if depth == config.num_built else _after(depth)
        self.read, self.deep = [key(depth) for depth in config.depths], [key(depth) for depth in config.deep]
        project = lambda states: Projector(
            config.width * states, config.hidden, config.output_width, bias=config.projector_bias, rngs=rngs
        )
        self.projector = project(len(self.read))
        for i in range(len(self.deep)):
            setattr(self, f"deep{i}", project(1))

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        x = jnp.concatenate([carry[name] for name in self.read], axis=-1)
        deep = {f"deep{i}": getattr(self, f"deep{i}")(carry[k][:, self.drop :], axes) for i, k in enumerate(self.deep)}
        found = {"x": self.projector(x[:, self.drop :], axes), **deep}
        return found if self.experts is None else found | moe.outcome(carry[ROUTING], self.experts)
