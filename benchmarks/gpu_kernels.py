"""Every attention kernel that a GPU may get equals the plain form, forward and backward, and leaks nothing.

    python benchmarks/gpu_kernels.py [--json FILE] [--tiny]

In float32 (true float32 products) and bfloat16, on rows of one document and packed ones, and as cp does it; errors are
||x - plain|| / ||plain|| of a plain form in float64 on the CPU. A leak is tried bit for bit: another token in one
document must leave outputs and gradients of all others as they were. A second call must give the same bits where
XLA_FLAGS holds --xla_gpu_deterministic_ops=true; elsewhere the values that differ are counted. Exit status 1 if a
kernel that hetjax picks is wrong; kernels of other libraries are tried and not judged.
"""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention import Form, candidates

from hetjax.core.layout import zigzag
from models.attention import attend, whole
from models.blockwise import blockwise
from models.sight import Sight

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    s, heads = (32, (4, 2, 16)) if flags.tiny else (1024, (8, 4, 64))
    block = s // 4
    picked: dict[str, Form] = {
        "attend": attend,
        "attend, cp 2": over_cp,
        "whole": whole,
        "blocks": functools.partial(blockwise, block=block),
    }
    found, good = [], True
    for packed in (False, True):
        for dtype in BOUNDS:
            given, places = draw(s, heads, packed, jnp.dtype(dtype))
            truth = plain(given, places)
            tried = picked | (candidates(packed) if dtype == "bfloat16" else {})
            for name, form in tried.items():
                row = {"form": name, "dtype": dtype, "packed": packed}
                try:
                    row |= judge(jax.jit(functools.partial(both, form, packed)), given, places, truth, packed)
                except Exception as failure:  # what a library raises for a kernel that it does not have here
                    row |= {
                        "error": math.inf,
                        "leaks": 0,
                        "unsteady": 0,
                        "failure": f"{type(failure).__name__}: {failure}"[:500],
                    }
                right = row["error"] <= BOUNDS[dtype] and not row["leaks"]
                right &= row["unsteady"] == 0 or DETERMINISTIC not in os.environ.get("XLA_FLAGS", "")
                good &= right or name not in picked
                found.append(row)
                said = "packed" if packed else "one document"
                print(
                    f"{name:<12} {dtype:<9} {said:<13} error {row['error']:.1e} of {BOUNDS[dtype]:.0e}, "
                    f"leaks {row['leaks']}, unsteady {row['unsteady']} {row.get('failure', '')[:120]}",
                    flush=True,
                )
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))
    return 0 if good else 1


def draw(s: int, heads: tuple[int, int, int], packed: bool, dtype: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """(queries, keys, values, cotangent), (positions, segments) of two rows; the second ends in padding."""
    rng = np.random.default_rng(0)
    h, kv, d = heads
    given = [jnp.asarray(rng.normal(size=(2, s, n, d)), dtype) for n in (h, kv, kv, h)]
    place = np.arange(s)
    cuts = np.array([[s // 3, s], [s // 2, s - s // 8]]) if packed else np.array([[s, s], [s - s // 8] * 2])
    second = place >= cuts[:, :1]
    segments = np.where(place < cuts[:, 1:], 1 + second, 0)
    positions = np.where(second, place - cuts[:, :1], place) * (segments > 0)
    given[3] = given[3] * (segments > 0)[..., None, None].astype(dtype)  # nobody asks for the output at padding
    return given, [jnp.asarray(a, jnp.int32) for a in (positions, segments)]


def both(
    form: Form, packed: bool, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array
) -> tuple[jax.Array, ...]:
    """The output where there are tokens, and the gradients."""
    sight = Sight(*places, *places, ordered=not packed, zigzag=1).ranged()
    y, pull = jax.vjp(lambda q, k, v: form(q, k, v, sight), q, k, v)
    return y * (places[1] > 0)[..., None, None].astype(y.dtype), *pull(g)


def over_cp(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    """`attend` as two devices of cp do it, each with its queries and all keys, in zig-zag order."""
    order = zigzag(q.shape[1], 2)
    keys = sight.positions[:, order], sight.segments[:, order]
    found = [
        attend(q[:, mine], k[:, order], v[:, order],
               Sight(sight.positions[:, mine], sight.segments[:, mine], *keys, zigzag=2).ranged())
        for mine in order.reshape(2, -1)
    ]  # fmt: skip
    return jnp.concatenate(found, 1)[:, np.argsort(order)]


def plain(given: list[jax.Array], places: list[jax.Array]) -> tuple[np.ndarray, ...]:
    """The plain form on the CPU, in float64."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = [jnp.asarray(np.asarray(a.astype(jnp.float32)), jnp.float64) for a in given]
        return tuple(map(np.asarray, both(whole, True, *wide, *(jnp.asarray(np.asarray(p)) for p in places))))


def judge(
    run: Any, given: list[jax.Array], places: list[jax.Array], truth: tuple[np.ndarray, ...], packed: bool
) -> dict[str, Any]:
    """The worst error of output and gradients, how many values leak, and how many another call gives other bits."""
    first, second = run(*given, *places), run(*given, *places)
    worst = max(error(a, b) for a, b in zip(first, truth, strict=True))
    unsteady = int(sum((a != b).sum() for a, b in zip(first, second, strict=True)))
    return {"error": worst, "leaks": leaks(run, given, places) if packed else 0, "unsteady": unsteady}


def error(mine: jax.Array, truth: np.ndarray) -> float:
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(mine.astype(jnp.float32)) - truth) / np.linalg.norm(truth))


def leaks(run: Any, given: list[jax.Array], places: list[jax.Array]) -> int:
    """Values of the other documents that change when the first document's tokens do."""
    before = run(*given, *places)
    first = (np.asarray(places[1]) == 1)[..., None, None]
    changed = [jnp.where(first, a + jnp.ones((), a.dtype), a) for a in given]
    after = run(*changed, *places)
    differ = [(np.asarray(a != b) & ~first).sum() for a, b in zip(before, after, strict=True)]
    return int(sum(differ))


if __name__ == "__main__":
    sys.exit(main())
