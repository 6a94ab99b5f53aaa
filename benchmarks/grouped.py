"""The grouped product of experts against one dense product of the same FLOPs: forward and both gradients.

    python benchmarks/grouped.py [--json FILE] [--tiny]

Tokens are spread evenly over the experts; bfloat16 activations and float32 weights, float32 on a CPU.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from synthetic import median_seconds

from models.grouped import grouped_dot
from models.layers import dot

CASES = ((8, 4096, 4096, 14336), (128, 8192, 2048, 768))  # experts, rows, features, hidden: Mixtral's, Qwen3-MoE's


def main() -> None:
    """Prints a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    found = [measure(*((8, 64, 16, 32) if flags.tiny else case)) for case in CASES]
    for row in found:
        print("{experts} experts, {rows} rows: {ratio:.2f} of the dense products".format(**row))
        print(*(f"  {name:<22} {ms:9.3f} ms" for name, ms in row["ms"].items()), sep="\n", flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


def measure(experts: int, rows: int, features: int, hidden: int) -> dict[str, Any]:
    """Milliseconds of each product, grouped and dense, and the ratio of their sums."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, features), dtype)
    w = jax.random.normal(keys[1], (experts, features, hidden), jnp.float32)
    g = jax.random.normal(keys[2], (rows, hidden), dtype)
    sizes = jnp.full(experts, rows // experts, jnp.int32)
    forms = {"grouped": (lambda x, w: grouped_dot(x, w, sizes), w), "dense": (dot, w[0])}
    runs = {f"{name} {part}": run for name, (form, w) in forms.items() for part, run in products(form, x, w, g).items()}
    ms = {name: 1e3 * seconds for name, seconds in median_seconds(runs, repeats=5).items()}
    total = {name: sum(v for key, v in ms.items() if key.startswith(name)) for name in forms}
    return {"experts": experts, "rows": rows, "ms": ms, "ratio": total["grouped"] / total["dense"]}


def products(form: Callable[..., jax.Array], x: jax.Array, w: jax.Array, g: jax.Array) -> dict[str, Callable[[], Any]]:
    """The product and its two gradients, each a program of its own."""
    programs = {
        "forward": jax.jit(lambda x, w, g: form(x, w)),
        "gradient of x": jax.jit(lambda x, w, g: jax.vjp(lambda x: form(x, w), x)[1](g)),
        "gradient of w": jax.jit(lambda x, w, g: jax.vjp(lambda w: form(x, w), w)[1](g)),
    }
    return {name: functools.partial(lambda f: jax.block_until_ready(f(x, w, g)), f) for name, f in programs.items()}


if __name__ == "__main__":
    main()
