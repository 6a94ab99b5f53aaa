"""A layer of the language model, of each kind: tokens that look at each other with an MLP or experts behind, or at an
encoder's rows. Behind any of them an encoder's features may be added."""

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax

from models import moe
from models.attention import attend, rotate
from models.axes import Axes
from models.context import attend_across
from models.contract import Batch
from models.cross_attention import MEDIA
from models.cross_attention import Layer as CrossLayer
from models.layers import GatedMlp, add, dot, dots, normal, ones, rms_norm, zeros
from models.moe import COUNTED, ROUTING, Mixture
from models.recompute import keeps_arguments
from models.rows import add_rows
from models.weight import Use

Carry = dict[str, Any]
Cache = dict[str, jax.Array]


class Feature(NamedTuple):
    """What of an encoder's output is added behind the layer of this number, at the encoder's places (DeepStack,
    arXiv:2406.04334)."""

    encoder: str
    layer: int

    @property
    def name(self) -> str:
        """Under which it enters."""
        return f"{self.encoder}.deep{self.layer}"

    @property
    def places(self) -> str:
        """What of the batch tells where they are."""
        return f"{self.encoder}.index"


class Layer(nnx.Module):
    """One layer of one of the `kinds` of a decoder; `config`: a `models.decoder.Decoder`."""

    def __init__(self, config: Any, kind: str, features: tuple[Feature, ...], *, rngs: nnx.Rngs) -> None:
        self.eps, self.kind, self.features = config.norm_eps, kind, features
        if kind == "cross":
            assert config.cross_attention is not None
            sizes = config.width, config.num_heads, config.num_kv_heads, config.head_features, config.norm_eps
            self.encoder = config.cross_attention.encoder
            self.cross = CrossLayer(config.cross_attention, config.mlp_width, *sizes, rngs=rngs)
            return
        self.attention_norm = ones((config.width,), (None,))
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = ones((config.width,), (None,))
        if kind == "moe":
            assert config.experts is not None
            self.moe = Mixture(config.experts, config.width, rngs=rngs)
        else:
            self.mlp = GatedMlp(config.width, config.mlp_width, rngs=rngs)

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        behind = {key: carry[key] for key in ("x", ROUTING, "cache") if key in carry}
        if self.kind == "cross":
            behind["x"] = self.cross(carry["x"], carry[self.encoder], batch[MEDIA], axes)
        else:
            behind |= self._own(behind, batch, axes)
        if "slot" not in batch:  # a token that is generated is no place of an item
            added = keeps_arguments(functools.partial(add_rows, axes=axes))
            for feature in self.features:
                behind["x"] = added(behind["x"], carry[feature.name], batch[feature.places])
        return behind

    def _own(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        """What changes in a layer whose tokens look at each other."""
        x, cache = carry["x"], carry.get("cache")
        y, cache = self.attention(rms_norm(x, self.attention_norm.get_value(), self.eps), batch, axes, cache)
        x = x + y
        y = rms_norm(x, self.mlp_norm.get_value(), self.eps)
        changed = {} if cache is None else {"cache": cache}
        if self.kind == "mlp":
            return {**changed, "x": x + self.mlp(y, axes)}
        y, row = self.moe(y, batch[COUNTED], axes)
        return {**changed, "x": x + y, ROUTING: moe.appended(carry[ROUTING], row)}


class Attention(nnx.Module):
    """Of tokens to those before them; heads are cut over tp, tokens over cp."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d, h, kv, k = config.width, config.num_heads, config.num_kv_heads, config.head_features
        self.q = normal(rngs, (d, h, k), (None, "heads", None), d**-0.5, Use("x"))
        self.k = normal(rngs, (d, kv, k), (None, "kv_heads", None), d**-0.5, Use("x"))
        self.v = normal(rngs, (d, kv, k), (None, "kv_heads", None), d**-0.5, Use("x"))
        self.o = normal(rngs, (h, k, d), ("heads", None, None), (h * k) ** -0.5, Use("y"))
        if config.attention_bias:
            self.q_bias = zeros((h, k), ("heads", None))
            self.k_bias = zeros((kv, k), ("kv_heads", None))
            self.v_bias = zeros((kv, k), ("kv_heads", None))
        if config.qk_norm:
            self.q_norm = ones((k,), (None,))
            self.k_norm = ones((k,), (None,))

    def __call__(self, x: jax.Array, batch: Batch, axes: Axes, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config = self.config
        q, k, v = dots(x, *(w.get_value() for w in (self.q, self.k, self.v)), gathers=axes.sp)
        if config.attention_bias:
            q, k, v = (add(y, b.get_value()) for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if config.qk_norm:
            q = rms_norm(q, self.q_norm.get_value(), config.norm_eps)
            k = rms_norm(k, self.k_norm.get_value(), config.norm_eps)
        q, k = rotate(q, batch["rotation"]), rotate(k, batch["rotation"])
        if cache:
            k, v = (lax.dynamic_update_slice_in_dim(cache[n], a, batch["slot"], 1) for n, a in (("k", k), ("v", v)))
            y = attend(q, k, v, batch["sight"])
        else:
            y = attend_across(q, k, v, batch["sight"], axes)
        y = axes.total(dot(y, self.o.get_value(), contract=2))
        return y, None if cache is None else {"k": k, "v": v}
