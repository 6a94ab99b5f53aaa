"""Attention: who may look at whom, rotary positions, and the one place that picks a kernel.

Packed rows hold several documents (segments 1, 2, ...) and padding (segment 0). Positions start again in each
segment, so "same segment, and not later" is the whole rule, whatever the order of the tokens: a sequence that is cut
and permuted over cp (zig-zag) needs nothing else.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from models.layers import wide

KINDS = ("llama3", "linear")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than `original_length`.

    linear divides all by `factor`. llama3 divides those with a wavelength above original_length / low_frequency_factor,
    keeps those below original_length / high_frequency_factor, and blends between (Llama 3.1).
    """

    kind: str  # llama3 or linear
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"RopeScaling.kind={self.kind!r}; it must be one of {', '.join(KINDS)}")
        for name in ("factor", "low_frequency_factor", "original_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"RopeScaling.{name}={getattr(self, name)}; it must be positive")
        if not self.high_frequency_factor > self.low_frequency_factor:
            raise ValueError(
                f"RopeScaling.high_frequency_factor={self.high_frequency_factor} must be larger than "
                f"low_frequency_factor={self.low_frequency_factor}; Llama 3.1 has 4 and 1"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, dtype: jnp.dtype) -> jax.Array:
    """Radians per position of each pair of features, [head_dim // 2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)  # over the original length
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """`x` [b, s, h, k] with feature pairs (i, i + k/2) turned by `positions` [b, s] times `frequencies` [k/2]."""
    angles = positions.astype(frequencies.dtype)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(frequencies.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(
    positions: jax.Array, segments: jax.Array, key_positions: jax.Array, key_segments: jax.Array, window: int | None
) -> jax.Array:
    """Whether a query [b, q] sees a key [b, k], as [b, q, k]: same segment, not later, less than `window` back."""
    behind = positions[:, :, None] - key_positions[:, None, :]
    seen = (segments[:, :, None] == key_segments[:, None, :]) & (segments[:, :, None] > 0) & (behind >= 0)
    return seen if window is None else seen & (behind < window)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attention of `q` [b, q, h, d] over `k`, `v` [b, k, kv, d], h a multiple of kv, as [b, q, h, d].

    `mask` [b, q, k] is True where a query sees a key (None: everywhere); a query that sees nothing yields 0. Memory
    grows with q * k, except on GPUs in 16 bits without a mask: there cuDNN's fused kernel runs, which has no segments.
    """
    # The backend of the process decides: a platform-dependent branch would keep the residuals of both kernels.
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    if fused and mask is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    b, s, h, d = q.shape
    grouped = q.reshape(b, s, k.shape[2], h // k.shape[2], d)
    logits = jnp.einsum("bqngd,bknd->bngqk", grouped, k, preferred_element_type=wide(q.dtype)) * d**-0.5
    if mask is None:
        weights = jax.nn.softmax(logits, -1)
    else:
        mask = mask[:, None, None]
        # finite, not -inf: the softmax of a query without any key is no NaN, and the outer where makes it 0
        weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), -1), 0)
    return jnp.einsum("bngqk,bknd->bqngd", weights.astype(v.dtype), v).reshape(b, s, h, d)
