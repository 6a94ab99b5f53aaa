"""Attention on Hopper GPUs for packed rows, windows and cp: the kernels of tokamax, told which keys each query sees.

Where documents stand one behind another, what a query sees is a range of the row's keys. The kernels take its ends,
[b, q] numbers, in place of a mask. They need no workspace, give the same bits again, and skip blocks of keys in the
forward; the backward skips what is behind a query where queries and keys are the same tokens.

The public operation of tokamax has neither ranges nor a rule for `jax.shard_map`, which comes from a primitive here.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import hopper
from models.axes import vary, varying_axes
from models.opaque import opaque
from models.sight import Ranges, Sight, in_order

KERNELS = tuple(f"tokamax._src.ops.attention.pallas_mosaic_gpu_{part}_sm90" for part in ("kernel", "vjp_kernel"))
FEATURES, TILE = (64, 128), 128  # of a head; tokens of a kernel's tile


def refusal(q: jax.Array, k: jax.Array, device_kind: str) -> str | None:
    """Why the kernels cannot serve where ranges are known; None where they can."""
    reason = hopper.refusal(device_kind, q.dtype)
    if reason is not None:
        return reason
    if q.shape[-1] not in FEATURES:
        return f"heads have {q.shape[-1]} features, not {' or '.join(map(str, FEATURES))}"
    if q.shape[1] % TILE or k.shape[1] % TILE:
        return f"{q.shape[1]} queries over {k.shape[1]} keys are not both multiples of {TILE}"
    return hopper.missing(KERNELS)


def fused(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    """Attention of `q` [b, q, h, d] over `k`, `v` [b, k, kv, d], as [b, q, h, d]; a query that sees nothing yields 0.

    The sight has `ranges`, and there is no `refusal`.
    """
    names = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((q, k, v, sight))))
    # Cast out here, all vary over the same axes inside; the transposes of the casts sum the gradients where needed.
    q, k, v, sight = jax.tree.map(lambda x: vary(x, names), (q, k, v, sight))
    assert sight.zigzag is not None and sight.ranges is not None
    k, v = (in_order(x, sight.zigzag) for x in (k, v))
    # Where queries are the keys, both are in order, and the kernels are told so in place of where a range ends.
    same = sight.causal and sight.zigzag == 1 and q.shape[1] == k.shape[1]
    return _attention(same, q, k, v, sight.ranges)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(same: bool, q: jax.Array, k: jax.Array, v: jax.Array, seen: Ranges) -> jax.Array:
    return _forward(same, q, k, v, seen)[0]


def _forward(same: bool, q: jax.Array, k: jax.Array, v: jax.Array, seen: Ranges) -> tuple[jax.Array, Any]:
    y, top, total = FORWARD.bind(q, k, v, *seen, same=same)
    return y, (q, k, v, seen, y, top, total)


def _backward(same: bool, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, seen, y, top, total = kept
    return *BACKWARD.bind(q, k, v, *seen, y, top, total, g, same=same), None


_attention.defvjp(_forward, _backward)


def _run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, end: jax.Array, *, same: bool
) -> Sequence[jax.Array]:
    kernel = importlib.import_module(KERNELS[0])

    row = functools.partial(
        kernel.flash_attention_kernel,
        bias=None,
        mask=None,
        is_causal=same,
        logits_soft_cap=None,
        logits_scale=q.shape[-1] ** -0.5,
        out_dtype=q.dtype,
        normalize_output=True,
        return_residuals=True,
        use_stable_softmax=True,
        rescale_threshold=1.0,
        config=kernel.Config(block_q=64, block_kv=128, num_stages=2),
    )
    first = within(first, end) if same else first
    call = lambda q, k, v, first, end: row(q, k, v, k_start=first[None], k_end=None if same else end[None])
    y, (top, total) = jax.vmap(call)(q, k, v, first, end)
    return y, top, total


def within(first: jax.Array, end: jax.Array) -> jax.Array:
    """`first` [b, q] for a forward whose queries end their ranges: a query that sees nothing begins behind itself.

    Where a whole tile of queries began behind its own keys, the kernel would wait for ever for keys that it does not
    load. The backward, which visits all tiles, needs such a query to begin behind all keys: what its place alone hides
    is no number there.
    """
    behind = jnp.arange(1, first.shape[1] + 1, dtype=jnp.int32)
    return jnp.where(end > 0, first, behind)


def _run_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    end: jax.Array,
    y: jax.Array,
    top: jax.Array,
    total: jax.Array,
    g: jax.Array,
    *,
    same: bool,
) -> Sequence[jax.Array]:
    kernel = importlib.import_module(KERNELS[1])

    row = functools.partial(
        kernel.flash_attention_vjp_kernel,
        bias=None,
        mask=None,
        logits_scale=q.shape[-1] ** -0.5,
        logits_soft_cap=None,
        is_causal=same,
        ds_dtype=None,
        config=kernel.Config(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2),
    )
    call = lambda q, k, v, first, end, y, top, total, g: row(
        q, k, v, (top, total), y, g, k_start=first[None], k_end=None if same else end[None]
    )[:3]
    return jax.vmap(call)(q, k, v, first, end, y, top, total, g)


def _forward_results(q: Any, *others: Any, same: bool) -> list[tuple[tuple[int, ...], Any]]:
    b, s, h, _ = q.shape
    return [(q.shape, q.dtype), *[((b, h, s), jnp.float32)] * 2]


FORWARD = opaque("fused_attention", _run_forward, _forward_results, narrow=True)
BACKWARD = opaque(
    "fused_attention_vjp", _run_backward, lambda *given, same: [(x.shape, x.dtype) for x in given[:3]], narrow=True
)
