"""Attention: rotary positions, and the one place that picks a kernel. Who may look at whom is models/sight.py."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.axes import program_device, vary_like
from models.blockwise import blockwise
from models.fused import fused, refusal
from models.hopper import say
from models.layers import wide
from models.recompute import keeps_arguments
from models.sight import Sight, everywhere

KINDS = ("llama3", "linear")
# Platform -> tokens in a block, and the product of queries and keys from which on causal attention goes in blocks;
# where every key is seen no block is skipped, and they pay from UNRULED times that product on. On a CPU core, float32,
# 8 heads of 64, 4 of keys, forward and backward of a row of 128 / 256 / 512 tokens took 1.5 / 6.7 / 27 ms of its time
# whole, 1.7 / 5.6 / 17 ms in blocks of 64 and 2.0 / 7.0 / 18 ms in blocks of 128. On an H200 a row of 8,192 tokens in 8
# documents took 18.0, 9.0 and 6.9 ms, and 0.2, 0.4 and 1.0 GiB, in blocks of 512, 1024 and 2048 (bfloat16, 16 heads of
# 128).
BLOCKS = {"cpu": (64, 256 * 256), "gpu": (1024, 2048 * 2048)}
UNRULED = 4


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


class Rotation(NamedTuple):
    """Rotary positions: cosine and sine of the angle of each token's pairs of features, [b, s, 1, k/2]."""

    cos: jax.Array
    sin: jax.Array


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


def rotation(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    """The turn by `positions` [b, s] times `frequencies` [k/2]."""
    angles = positions.astype(frequencies.dtype)[:, :, None, None] * frequencies[None, None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@keeps_arguments
def rotate(x: jax.Array, turn: Rotation) -> jax.Array:
    """`x` [b, s, h, k] with feature pairs (i, i + k/2) turned."""
    cos, sin = turn
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight | None = None) -> jax.Array:
    """Attention of `q` [b, q, h, d] over `k`, `v` [b, k, kv, d], h a multiple of kv, as [b, q, h, d].

    Without a `sight` every query sees every key. A query that sees nothing yields 0 (unless the sight is `ordered`,
    see there). On GPUs in 16 bits cuDNN serves what it can: no sight, and an ordered one; the kernels of
    models/fused.py serve packed rows, windows and cp where they can. Anything else is computed whole while it is small,
    with memory that grows with q * k, and in blocks where it is large.
    """
    if _cudnn_serves(q, sight):
        window = None if sight is None or sight.window is None else (sight.window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=sight is not None, local_window_size=window, implementation="cudnn"
        )
    device = program_device()  # one kernel is traced: a branch in the program would keep the residuals of all
    if device.platform == "gpu" and sight is not None and sight.zigzag is not None:
        reason = refusal(q, k, device.device_kind)
        if reason is None:
            return fused(q, k, v, sight)
        say("attention goes", reason)
    block, large = _blocks()
    if q.shape[1] * k.shape[1] >= (large if sight is not None and sight.causal else UNRULED * large):
        return blockwise(q, k, v, sight or everywhere(q, k), block=block)
    return whole(q, k, v, sight)


def prepared(sight: Sight) -> Sight:
    """`sight` with what kernels want of it once per program, not in each layer."""
    known = sight.zigzag is not None and not sight.ordered
    return sight.ranged() if known and program_device().platform == "gpu" else sight


def plain_block(reason: str) -> int:
    """Tokens in a block of attention in plain XLA; on GPUs the log says once why no kernel serves."""
    if program_device().platform == "gpu":
        say("attention goes", reason)
    return _blocks()[0]


def _blocks() -> tuple[int, int]:
    """See `BLOCKS`."""
    return BLOCKS.get(program_device().platform, BLOCKS["gpu"])


def _cudnn_serves(q: jax.Array, sight: Sight | None) -> bool:
    """Whether cuDNN can stand in: it is causal by order, and knows no segments."""
    known = (sight is None or (sight.ordered and sight.causal)) and program_device().platform == "gpu"
    return known and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def whole(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight | None = None) -> jax.Array:
    """`attend` with all weights in memory at once."""
    b, s, h, d = q.shape
    kv = k.shape[2]
    # Each product is one of matrices as they lie in memory: queries that share keys behind each other, heads in front.
    q = q.reshape(b, s, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, d)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=wide(q.dtype))
    mask = None if sight is None else vary_like(sight.mask(), logits)
    weights = _softmax(d**-0.5, v.dtype, logits if mask is None else vary_like(logits, mask), mask)
    y = jnp.einsum("bnqk,bnkd->bnqd", weights, v)
    return y.reshape(b, kv, -1, s, d).transpose(0, 3, 1, 2, 4).reshape(b, s, h, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(scale: float, dtype: Any, logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The softmax of `scale` times `logits` [b, kv, h / kv * q, k] over the keys that `mask` [b, q, k] shows, 0 for
    the others, as `dtype`."""
    logits = logits * scale
    if mask is None:
        return jax.nn.softmax(logits, -1).astype(dtype)
    each = logits.reshape(*logits.shape[:2], -1, *mask.shape[1:])
    mask = mask[:, None, None]
    # finite, not -inf: the softmax of a query without any key is no NaN, and the outer where makes it 0
    each = jnp.where(mask, jax.nn.softmax(jnp.where(mask, each, jnp.finfo(each.dtype).min), -1), 0)
    return each.reshape(logits.shape).astype(dtype)


def _softmax_forward(
    scale: float, dtype: Any, logits: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    weights = _softmax(scale, dtype, logits, mask)
    return weights, weights


def _softmax_backward(scale: float, dtype: Any, weights: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    """Given the weights that the values meet, which are kept for these already, and no mask, which would be as large:
    what is hidden has weight 0."""
    weights, g = weights.astype(wide(dtype)), g.astype(wide(dtype))
    return scale * weights * (g - jnp.sum(weights * g, -1, keepdims=True)), None


_softmax.defvjp(_softmax_forward, _softmax_backward)
