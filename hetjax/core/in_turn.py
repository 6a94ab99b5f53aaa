"""Order among what a program does, where only a value can say it.

XLA runs on CPUs what does not depend on a loop beside that loop, and tells two collectives of one kind that are under
way at a time apart by nothing (jax gives all of them one channel): values of one then end in the other. So what holds
collectives waits there for a loop that holds some, by a dependence that XLA does not see through. On GPUs a program's
collectives go one after the other.

XLA also copies on CPUs what it can at a program's begin, rows of stacked weights too: those of layers outside of any
loop would all lie in memory at a time, which costs time for their pages.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from models.axes import program_device, vary, varying_axes

NEVER = {2: 0x7FAB, 4: 0x7FABCDEF, 8: 0x7FFABCDE12345678}  # bytes -> the bits of a NaN that no operation makes


def behind(tree: Any, before: Any) -> Any:
    """`tree` of which, on CPUs, no floating-point array is used until `before` are there.

    An array waits for those arrays that differ between no other devices than it does itself.
    """
    never = _never(before)
    flags: dict[frozenset[str], jax.Array] = {}  # False behind all that an array waits for, by the axes it varies over
    for axes in set(map(varying_axes, jax.tree.leaves(tree))):
        if mine := [vary(flag, axes) for flag in never if varying_axes(flag) <= axes]:
            flags[axes] = jnp.stack(mine).any()

    def wait(a: jax.Array) -> jax.Array:
        axes = varying_axes(a)
        waits = axes in flags and jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.where(flags[axes], jnp.zeros_like(a), a) if waits else a

    return jax.tree.map(wait, tree)


def zero_behind(before: Any, axes: Sequence[str]) -> jax.Array | int:
    """0, which on CPUs is not known until those of `before` are there that vary over no other axes than these: a slice
    that begins there is not copied long before it is used."""
    mine = [vary(flag, tuple(axes)) for flag in _never(before) if varying_axes(flag) <= set(axes)]
    return jnp.stack(mine).any().astype(jnp.int32) if mine else 0


def _never(before: Any) -> list[jax.Array]:
    """False behind each floating-point array of `before`, on CPUs."""
    done = [a for a in jax.tree.leaves(before) if jnp.issubdtype(a.dtype, jnp.floating)]
    if program_device().platform != "cpu":
        return []
    return [lax.bitcast_convert_type(a.reshape(-1)[0], f"uint{8 * a.itemsize}") == NEVER[a.itemsize] for a in done]
