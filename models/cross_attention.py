"""Layers of a decoder that look at an encoder's output in place of the text before them (Flamingo, arXiv:2204.14198, in
the shape that Llama 3.2 Vision gave them).

Queries come from the text, keys and values from the rows of the encoder's items; there are no rotary positions, and
queries and keys have norms per head. What the attention and the MLP behind it give enters through gates, the tanh of a
number each. An item has a place in the text: the tokens of its document from there on see all of its rows, and no other
tokens do. Where a token sees no item, the layer leaves it as it is.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import attend
from models.axes import Axes, vary_like
from models.layers import GatedMlp, dot, dots, normal, ones, own, rms_norm, wide
from models.recompute import keeps_arguments
from models.sight import Sight
from models.weight import Use

MEDIA = "media"  # what such layers are given of a batch, a `Media`


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """Which layers of a decoder attend to an encoder."""

    layers: tuple[int, ...]  # counted from 0, of all num_layers
    encoder: str = "vision"
    gate: float = 0.0  # of which the tanh is taken, before the first step; 0: the layers do nothing yet

    def __post_init__(self) -> None:
        given: Any = self.layers
        layers = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not layers or not all(type(i) is int and i >= 0 for i in layers) or len(set(layers)) < len(layers):
            raise ValueError(
                f"CrossAttention.layers={self.layers!r}; it must be a list of different layers, counted from 0"
            )
        if not math.isfinite(self.gate):
            raise ValueError(f"CrossAttention.gate={self.gate!r}; it must be a finite number")
        object.__setattr__(self, "layers", tuple(sorted(layers)))

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError unless they are some, and not all, of a decoder's layers."""
        if self.layers[-1] >= num_layers:
            raise ValueError(
                f"CrossAttention.layers names layer {self.layers[-1]}; with Decoder.num_layers={num_layers}, which "
                f"counts them too, they are 0 to {num_layers - 1}"
            )
        if len(self.layers) == num_layers:
            raise ValueError(
                f"CrossAttention.layers names all {num_layers} layers, so none looks at the text; leave one out"
            )

    def check_encoders(self, encoders: tuple[str, ...], deepstack: Mapping[str, int]) -> None:
        """Raises ValueError unless `encoder` is one of these, if any are known, and gives no features to add
        (`deepstack`: how many)."""
        if encoders and self.encoder not in encoders:
            raise ValueError(
                f"CrossAttention.encoder={self.encoder!r}; the encoders are {list(encoders)}; name one, or set "
                "Decoder.cross_attention to None"
            )
        if deepstack.get(self.encoder):
            raise ValueError(
                f"CrossAttention.encoder={self.encoder!r} gives features to add at its places in the text (deepstack), "
                "but layers attend to it, and its items have one place each; set the encoder's deepstack to ()"
            )


class Media(NamedTuple):
    """Where tokens and items stand. Documents are numbered over all rows of text, from 1 on; 0 is padding."""

    positions: jax.Array  # of this device's tokens in their documents, [1, b * s]
    documents: jax.Array  # [1, b * s]
    places: jax.Array  # as `merge` takes an index, of all tokens of cp, [tokens]
    place_positions: jax.Array  # of these tokens
    place_documents: jax.Array


def media(
    index: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    all_positions: jax.Array,
    all_segments: jax.Array,
    axes: Axes,
) -> Media:
    """From what a microbatch has, each [b, s], and of all tokens of cp, or of all that are remembered, [b, tokens].
    `index` is of this device's tokens, or of those that are remembered."""
    index = index if index.shape == all_segments.shape else axes.cp.gather(index, dim=1)
    b, tokens = all_segments.shape
    starts = jnp.arange(b, dtype=jnp.int32)[:, None] * tokens  # a row has at most as many documents
    number = lambda segments: jnp.where(segments > 0, starts + segments, 0)
    flat = lambda x: x.reshape(-1)
    here = positions.reshape(1, -1), number(segments).reshape(1, -1)
    return Media(*here, flat(index), flat(all_positions), flat(number(all_segments)))


def who_sees(found: Media, items: int, rows: int, dtype: Any, axes: Axes) -> tuple[Sight, jax.Array]:
    """(which rows of this replica's `items`, of so many `rows` each, its tokens see; [b * s] of `dtype`: 1 for a token
    that sees any, else 0). All are NaN where an index points at another replica's items: wrong ones would train in
    silence."""
    item = found.places // rows - axes.dp.index() * items
    stands = (found.places >= 0) & (found.places % rows == 0)  # by its first row
    at = jnp.where(stands, item, items)
    put = lambda x: vary_like(jnp.zeros(items, x.dtype), at).at[at].set(x, mode="drop")[None]
    by_item = Sight(found.positions, found.documents, put(found.place_positions), put(found.place_documents))
    sees = by_item.mask().any(-1)[0].astype(dtype)
    stray = (stands & ((item < 0) | (item >= items))).any()
    of_rows = lambda x: jnp.repeat(x, rows, 1)
    by_row = dataclasses.replace(
        by_item, key_positions=of_rows(by_item.key_positions), key_segments=of_rows(by_item.key_segments)
    )
    return by_row, jnp.where(stray, jnp.nan, sees)


class Attention(nnx.Module):
    """Attention of the text to an encoder's rows; heads are cut over tp."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, eps: float, *, rngs: nnx.Rngs) -> None:
        d, h, kv, k, self.eps = width, heads, kv_heads, head_dim, eps
        self.q = normal(rngs, (d, h, k), (None, "heads", None), d**-0.5, Use("x"))
        self.k = normal(rngs, (d, kv, k), (None, "kv_heads", None), d**-0.5, Use("rows"))
        self.v = normal(rngs, (d, kv, k), (None, "kv_heads", None), d**-0.5, Use("rows"))
        self.o = normal(rngs, (h, k, d), ("heads", None, None), (h * k) ** -0.5, Use("y"))
        self.q_norm, self.k_norm = ones((k,), (None,)), ones((k,), (None,))

    def __call__(self, x: jax.Array, rows: jax.Array, sight: Sight, axes: Axes) -> jax.Array:
        """`x` [b, s, d] of the stream, `rows` [items, rows, d] of this data replica."""
        q = dot(x, self.q.get_value(), gathers=axes.sp)
        k, v = dots(rows.astype(x.dtype), self.k.get_value(), self.v.get_value())
        q = rms_norm(q, self.q_norm.get_value(), self.eps)
        k = rms_norm(k, self.k_norm.get_value(), self.eps)
        # all rows of text as one, and all items: documents tell them apart
        one = lambda a: a.reshape(1, -1, *a.shape[2:])
        y = attend(one(q), one(k), one(v), jax.tree.map(axes.tp.vary, sight)).reshape(q.shape)
        return axes.total(dot(y, self.o.get_value(), contract=2))


class Layer(nnx.Module):
    """One such layer of a decoder; `sizes` are those of `Attention`."""

    def __init__(self, config: CrossAttention, mlp_width: int, *sizes: Any, rngs: nnx.Rngs) -> None:
        width, self.eps = sizes[0], sizes[-1]
        self.attention_norm, self.mlp_norm = ones((width,), (None,)), ones((width,), (None,))
        self.attention = Attention(*sizes, rngs=rngs)
        self.mlp = GatedMlp(width, mlp_width, rngs=rngs)
        gate = lambda: nnx.Param(jnp.full((1,), config.gate, jnp.float32), logical=(None,))
        self.attention_gate, self.mlp_gate = gate(), gate()

    def __call__(self, x: jax.Array, rows: jax.Array, found: Media, axes: Axes) -> jax.Array:
        """`x` [b, s, d] of the stream behind the layer, `rows` [items, rows, d] of this data replica."""
        sight, sees = who_sees(found, rows.shape[0], rows.shape[1], x.dtype, axes)
        sees = own(sees.reshape(len(x), -1), 1, axes.sp)
        y = self.attention(rms_norm(x, self.attention_norm.get_value(), self.eps), rows, sight, axes)
        x = x + gated(y, self.attention_gate.get_value(), sees)
        y = self.mlp(rms_norm(x, self.mlp_norm.get_value(), self.eps), axes)
        return x + gated(y, self.mlp_gate.get_value(), sees)


@keeps_arguments
def gated(y: jax.Array, gate: jax.Array, sees: jax.Array) -> jax.Array:
    """`y` [b, s, d] times the tanh of `gate` [1], where `sees` [b, s] is 1."""
    precise = y.astype(wide(y.dtype)) * jnp.tanh(gate)[None, None] * sees[..., None]
    return precise.astype(y.dtype)
