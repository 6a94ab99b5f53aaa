"""The language model: a decoder of the Llama family, into which the rows of encoders are merged.

Differences between the members are settings: grouped heads, biases (Qwen2), norms of queries and keys (Qwen3), a
sliding window (Mistral), scaled rotary positions (Llama 3.1), a head tied to the embedding, experts in place of MLPs
(Mixtral, Qwen2-MoE, Qwen3-MoE, dots.llm1).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from models import moe
from models.attention import RopeScaling, attend, rope_frequencies, rotate, rotation
from models.axes import Axes, vary_like
from models.context import attend_across, prepared, rows_are_whole
from models.contract import Batch, Cached, Dims, ModuleDef, Part
from models.layers import GatedMlp, add, check_counts, dot, dots, normal, ones, own, rms_norm, wide, zeros
from models.moe import COUNTED, ROUTING, Experts, Mixture
from models.nnx_parts import part
from models.recompute import keeps_arguments
from models.sight import Sight
from models.weight import Use, Weight

Carry = dict[str, Any]
Cache = dict[str, jax.Array]
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
        if self.experts is not None:
            self.experts.check_layers(self.num_layers, "Decoder")

    @property
    def head_features(self) -> int:
        """Features of a head: `head_dim`, which is never None once checked."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each layer has behind its attention: "mlp" or "moe"."""
        dense = range(self.num_layers) if self.experts is None else self.experts.dense_layers
        return tuple("mlp" if i in dense else "moe" for i in range(self.num_layers))

    def module(self, compute_dtype: Any, *, encoders: tuple[str, ...] = (), packed: bool = True) -> ModuleDef:
        """The model as the core sees it, merging the outputs of `encoders`; activations are in `compute_dtype`.

        `packed` False promises that each row holds one document, in order, with padding behind it: kernels that know
        no segments may then serve. What comes out at padding differs, and nobody reads it.
        """
        reads = ("tokens", "positions", "segment_ids", "targets", "weights", *(f"{e}.index" for e in encoders))
        layers = {kind: self._layer(kind) for kind in set(self.kinds)}
        hidden = {"mlp": self.mlp_width} if "mlp" in layers else {}
        routed = moe.declare(self.experts)
        carry: dict[str, Dims] = {"x": ("batch", "stream", None)}
        output: dict[str, Dims] = {"x": (*TOKEN_DIMS, None), "head": (None, "vocab")}
        return ModuleDef(
            first=part(lambda rngs: _First(self, jnp.dtype(compute_dtype), encoders, rngs=rngs)),
            layers=tuple(layers[kind] for kind in self.kinds),
            last=part(lambda rngs: _Last(self, rngs=rngs)),
            prepare=functools.partial(_places, self, wide(compute_dtype), packed),
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
            width=self.width,
        )

    def _layer(self, kind: str) -> Part:
        return part(lambda rngs: _Layer(self, kind, rngs=rngs))


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


def lookup(table: jax.Array | Weight, tokens: jax.Array, vocab: int, axes: Axes) -> jax.Array:
    """Rows of `table`, cut over tp, as the stream has them; an id that is none of the `vocab` yields zeros."""
    rows, tap = (table.value, table.tap) if isinstance(table, Weight) else (table, None)
    local = tokens - axes.tp.index() * rows.shape[0]
    mine = (local >= 0) & (local < rows.shape[0]) & (tokens < vocab)
    at, rows = jnp.where(mine, local, 0), vary_like(rows, local)
    found = _take(rows, at) if tap is None else _take_tapped(rows, vary_like(tap, local), at)
    return axes.total(jnp.where(mine[..., None], found, 0))


def _take(table: jax.Array, at: jax.Array) -> jax.Array:
    return table.at[at].get(mode="promise_in_bounds")


@jax.custom_vjp
def _take_tapped(table: jax.Array, tap: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of `table`. Their gradients are added to `tap`: an accumulator in its place needs no array of its size."""
    return _take(table, at)


_take_tapped.defvjp(
    lambda table, tap, at: (_take(table, at), (tap, at)),
    lambda kept, g: (None, kept[0].at[kept[1]].add(g.astype(kept[0].dtype), mode="promise_in_bounds"), None),
)


def merge(x: jax.Array, rows: jax.Array, index: jax.Array, axes: Axes) -> jax.Array:
    """`x` [b, s, d] of the stream with an encoder's row wherever `index` [b, s], of all devices of tp, is not -1.

    `rows` [items, rows per item, d] are those of this data replica, `index` counts over all replicas. An index that
    points at another replica's rows yields NaN, which stops the run; wrong rows would train in silence.
    """
    index = own(index, 1, axes.sp)
    flat = rows.reshape(-1, rows.shape[-1]).astype(x.dtype)
    local = jnp.where(index >= 0, index - axes.dp.index() * flat.shape[0], 0)
    wanted = vary_like(flat, local).at[local].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return jnp.where((index >= 0)[..., None], wanted, x)


def _places(config: Decoder, dtype: Any, packed: bool, batch: Batch, axes: Axes) -> Batch:
    """What the layers are given of a batch: rotary positions as `dtype`, who sees whom; the slot of a cache."""
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
    if config.experts is not None:
        found[COUNTED] = moe.count_tokens(segments > 0, axes, dtype)
    return found | {"slot": batch["cache.slot"]} if cached else found


class _Layer(nnx.Module):
    def __init__(self, config: Decoder, kind: str, *, rngs: nnx.Rngs) -> None:
        self.eps, self.kind = config.norm_eps, kind
        self.attention_norm = ones((config.width,), (None,))
        self.attention = _Attention(config, rngs=rngs)
        self.mlp_norm = ones((config.width,), (None,))
        if kind == "moe":
            assert config.experts is not None
            self.moe = Mixture(config.experts, config.width, rngs=rngs)
        else:
            self.mlp = GatedMlp(config.width, config.mlp_width, rngs=rngs)

    def __call__(self, carry: Carry, batch: Batch, axes: Axes) -> Carry:
        x, cache = carry["x"], carry.get("cache")
        y, cache = self.attention(rms_norm(x, self.attention_norm.get_value(), self.eps), batch, axes, cache)
        x = x + y
        y = rms_norm(x, self.mlp_norm.get_value(), self.eps)
        behind = carry if cache is None else {**carry, "cache": cache}
        if self.kind == "mlp":
            return {**behind, "x": x + self.mlp(y, axes)}
        y, row = self.moe(y, batch[COUNTED], axes)
        return {**behind, "x": x + y, ROUTING: moe.appended(carry[ROUTING], row)}


class _Attention(nnx.Module):
    def __init__(self, config: Decoder, *, rngs: nnx.Rngs) -> None:
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
