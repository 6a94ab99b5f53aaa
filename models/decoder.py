"""The language model: a decoder of the Llama family, into which the rows of encoders are merged.

Differences between the members are settings: grouped heads, biases (Qwen2), norms of queries and keys (Qwen3), a
sliding window (Mistral), scaled rotary positions (Llama 3.1), a head tied to the embedding, experts in place of MLPs
(Mixtral, Qwen3-MoE), layers that attend to an encoder (Llama 3.2 Vision), features of an encoder's layers added behind
the first layers (Qwen3-VL).
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import moe
from models.attention import RopeScaling, rope_frequencies, rotation
from models.axes import Axes
from models.context import prepared, rows_are_whole
from models.contract import Batch, Cached, Dims, ModuleDef, Part
from models.cross_attention import MEDIA, CrossAttention, media
from models.decoder_layer import Carry, Feature, Layer
from models.layers import check_counts, normal, ones, rms_norm, wide
from models.moe import COUNTED, ROUTING, Experts
from models.nnx_parts import part
from models.recompute import keeps_arguments
from models.rows import lookup, merge
from models.sight import Sight
from models.weight import Use

TOKEN_DIMS = ("batch", "seq")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes and variants of a decoder-only language model."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    head_dim: int | None = None  # None: width // num_heads
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = False  # norm each head's queries and keys (Qwen3)
    attention_bias: bool = False  # biases of queries, keys and values (Qwen2)
    sliding_window: int | None = None  # tokens that a query sees, itself included; None: all before it
    tied: bool = False  # the head is the embedding
    experts: Experts | None = None  # in place of the MLPs, of which mlp_width is the width
    cross_attention: CrossAttention | None = None  # layers, counted in num_layers, that attend to an encoder

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"Decoder.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: each "
                "key-value head serves the same number of heads; change either"
            )
        if self.head_dim is None:
            if self.width % self.num_heads:
                raise ValueError(
                    f"Decoder.width={self.width} is not a multiple of num_heads={self.num_heads}; "
                    "change either, or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        check_counts(self, "head_dim")
        if self.head_features % 2:
            raise ValueError(
                f"Decoder.head_dim={self.head_dim} is odd, and rotary positions turn pairs of features; make it even"
            )
        if self.sliding_window is not None:
            check_counts(self, "sliding_window")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Decoder.{name}={getattr(self, name)}; it must be positive")
        if self.cross_attention is not None:
            self.cross_attention.check_layers(self.num_layers)
        if self.experts is not None:
            self.experts.check_layers(self.num_layers, "Decoder")
            if "moe" not in self.kinds:
                raise ValueError(
                    "Decoder.experts: Experts.dense_layers and CrossAttention.layers together name all layers, so none "
                    "has experts; leave one out, or set Decoder.experts to None"
                )

    @property
    def head_features(self) -> int:
        """Features of a head: `head_dim`, which is never None once checked."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each layer has behind its attention, "mlp" or "moe"; "cross" where that is to an encoder."""
        dense = range(self.num_layers) if self.experts is None else self.experts.dense_layers
        cross = () if self.cross_attention is None else self.cross_attention.layers
        return tuple("cross" if i in cross else "mlp" if i in dense else "moe" for i in range(self.num_layers))

    def module(
        self,
        compute_dtype: Any,
        *,
        encoders: tuple[str, ...] = (),
        deepstack: Mapping[str, int] | None = None,
        packed: bool = True,
    ) -> ModuleDef:
        """The model as the core sees it, merging the outputs of `encoders`; activations are in `compute_dtype`.

        `deepstack`: how many further outputs an encoder has, "deep0" on, which are added behind the first layers.

        `packed` False promises that each row holds one document, in order, with padding behind it: kernels that know
        no segments may then serve. What comes out at padding differs, and nobody reads it.
        """
        features = self._features(encoders, deepstack or {})
        attended = () if self.cross_attention is None else (self.cross_attention.encoder,)
        merged = tuple(e for e in encoders if e not in attended)
        indices = (f"{e}.index" for e in (*merged, *attended))
        reads = ("tokens", "positions", "segment_ids", "targets", "weights", *indices)
        which = list(zip(self.kinds, features, strict=True))
        layers = {kind: self._layer(*kind) for kind in dict.fromkeys(which)}
        added = tuple(dict.fromkeys(feature.places for feature in itertools.chain(*features)))
        hidden = {} if set(self.kinds) == {"moe"} else {"mlp": self.mlp_width}
        routed = moe.declare(self.experts)
        carry: dict[str, Dims] = {"x": ("batch", "stream", None)}
        output: dict[str, Dims] = {"x": (*TOKEN_DIMS, None), "head": (None, "vocab")}
        return ModuleDef(
            first=part(lambda rngs: _First(self, jnp.dtype(compute_dtype), merged, rngs=rngs), takes=merged),
            layers=tuple(layers[kind] for kind in which),
            last=part(lambda rngs: _Last(self, rngs=rngs)),
            prepare=functools.partial(_places, self, wide(compute_dtype), packed, added),
            reads=dict.fromkeys(reads, TOKEN_DIMS),
            carry=carry | routed.carry,
            output=output | routed.output,
            config=self,
            compute_dtype=jnp.dtype(compute_dtype),
            divisible={
                "tp": {"heads": self.num_heads, **hidden, **routed.tp},
                "kv": {"kv_heads": self.num_kv_heads},
                "ep": routed.ep,
            },
            axes=frozenset({"dp", "pp", "copies", "cp", "tp", "sp", *(["ep"] if self.experts else [])}),
            heads=self.num_heads,
            head="head",
            vocab=self.vocab_size,
            table="embed",
            tied={"head": "embed"} if self.tied else {},
            bias_rate=routed.bias_rate,
            cache=dict.fromkeys(("k", "v"), Cached((self.num_kv_heads, self.head_features), ("kv_heads", None))),
            recalls=attended,
            width=self.width,
        )

    def _features(self, encoders: tuple[str, ...], deepstack: Mapping[str, int]) -> list[tuple[Feature, ...]]:
        """Those that are added behind each layer. Raises ValueError where encoders and layers do not fit."""
        if self.cross_attention is not None:
            self.cross_attention.check_encoders(encoders, deepstack)
        for name, count in deepstack.items():
            if count > self.num_layers:
                raise ValueError(
                    f"Decoder.num_layers={self.num_layers}, but {name} gives features for {count} layers (deepstack); "
                    "let it give fewer"
                )
        depths = range(self.num_layers)
        return [tuple(Feature(e, depth) for e in encoders if depth < deepstack.get(e, 0)) for depth in depths]

    def _layer(self, kind: str, features: tuple[Feature, ...]) -> Part:
        attended = (self.cross_attention.encoder,) if self.cross_attention and kind == "cross" else ()
        takes = (*attended, *(feature.name for feature in features))
        return part(lambda rngs: Layer(self, kind, features, rngs=rngs), takes=takes)


class _First(nnx.Module):
    def __init__(self, config: Decoder, compute_dtype: jnp.dtype, encoders: tuple[str, ...], *, rngs: nnx.Rngs) -> None:
        self.config, self.compute_dtype, self.encoders = config, compute_dtype, encoders
        self.embed = normal(rngs, (config.vocab_size, config.width), ("vocab", None), config.width**-0.5, Use("tokens"))

    def __call__(self, rows: Mapping[str, jax.Array], batch: Batch, axes: Axes) -> Carry:
        found = keeps_arguments(functools.partial(lookup, vocab=self.config.vocab_size, axes=axes))
        merged = keeps_arguments(functools.partial(merge, axes=axes))
        x = found(self.embed.get_value(), batch["tokens"]).astype(self.compute_dtype)
        for name in self.encoders:
            x = merged(x, rows[name], batch[f"{name}.index"])
        experts = self.config.experts
        if experts is None:
            return {"x": x}
        return {"x": x, ROUTING: moe.no_routing(experts, self.config.kinds.count("moe"), x)}


def _places(config: Decoder, dtype: Any, packed: bool, added: tuple[str, ...], batch: Batch, axes: Axes) -> Batch:
    """What the layers are given of a batch: rotary positions as `dtype`, who sees whom; the slot of a cache; the arrays
    `added`, which tell the places where features are added."""
    positions, segments = batch["positions"], batch["segment_ids"]
    cached = "cache.slot" in batch
    if cached:
        keys = batch["cache.positions"], batch["cache.segment_ids"]
    else:
        keys = axes.cp.gather(positions, dim=1), axes.cp.gather(segments, dim=1)
    ordered = not packed and not cached and rows_are_whole(axes)
    zigzag = None if cached else axes.cp.size
    sight = Sight(positions, segments, *keys, window=config.sliding_window, ordered=ordered, zigzag=zigzag)
    sight = sight if cached else prepared(sight, axes)
    frequencies = rope_frequencies(config.head_features, config.rope_theta, config.rope_scaling, dtype)
    # of the type in which the heads meet them: cast in a layer they would be kept by each of them
    found = jax.tree.map(axes.tp.vary, {"rotation": rotation(positions, frequencies), "sight": sight})
    if config.cross_attention is not None:
        found[MEDIA] = media(batch[f"{config.cross_attention.encoder}.index"], positions, segments, *keys, axes)
    if config.experts is not None:
        found[COUNTED] = moe.count_tokens(segments > 0, axes, dtype)
    return found | ({"slot": batch["cache.slot"]} if cached else {key: batch[key] for key in added})


class _Last(nnx.Module):
    def __init__(self, config: Decoder, *, rngs: nnx.Rngs) -> None:
        d, vocab = config.width, config.vocab_size
        self.eps, self.tied, self.experts = config.norm_eps, config.tied, config.experts
        self.norm = ones((d,), (None,))
        shape, dims = ((vocab, d), ("vocab", None)) if config.tied else ((d, vocab), (None, "vocab"))
        self.head = normal(rngs, shape, dims, d**-0.5, Use("x"))

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        head = self.head.get_value()
        x = axes.sp.gather(rms_norm(carry["x"], self.norm.get_value(), self.eps), dim=1)
        found = {"x": x, "head": head.T if self.tied else head}
        return found if self.experts is None else found | moe.outcome(carry[ROUTING], self.experts)
