"""The grouped product of experts against one dense product of the same FLOPs: forward and both gradients.

    python benchmarks/grouped.py [--json FILE] [--tiny]

Tokens are spread evenly over the experts; bfloat16 activations and float32 weights, float32 on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from synthetic import median_seconds

from models.layers import dot
from models.moe import grouped_dot

CASES = ((8, 4096, 4096, 14336), (128, 8192, 2048, 768))  # experts, rows, features, hidden: Mixtral's, Qwen3-MoE's


def main() -> None:
    """Prints a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    found = [measure(*((8, 64, 16, 32) if flags.tiny else case)) for case in CASES]
    for row in found:
        print("{experts} experts, {rows} rows: {ratio:.2f} of the dense product's {dense_ms:.3f} ms".format(**row))
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


def measure(experts: int, rows: int, features: int, hidden: int) -> dict[str, Any]:
    """Seconds of both, as milliseconds and their ratio."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, features), dtype)
    w = jax.random.normal(keys[1], (experts, features, hidden), jnp.float32)
    g = jax.random.normal(keys[2], (rows, hidden), dtype)
    sizes = jnp.full(experts, rows // experts, jnp.int32)
    grouped = jax.jit(lambda x, w, g: jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)[1](g))
    dense = jax.jit(lambda x, w, g: jax.vjp(lambda x, w: dot(x, w), x, w)[1](g))
    runs = {
        "grouped": lambda: jax.block_until_ready(grouped(x, w, g)),
        "dense": lambda: jax.block_until_ready(dense(x, w[0], g)),
    }
    seconds = median_seconds(runs, repeats=5)
    return {
        "experts": experts,
        "rows": rows,
        "grouped_ms": 1e3 * seconds["grouped"],
        "dense_ms": 1e3 * seconds["dense"],
        "ratio": seconds["grouped"] / seconds["dense"],
    }


if __name__ == "__main__":
    main()
