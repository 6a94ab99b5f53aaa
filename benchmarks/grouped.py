"""The grouped product of experts: it costs what the active ones cost, however many there are.

    python benchmarks/grouped.py [--json FILE] [--tiny] [--described] [--repeats 6]

Forward and both gradients for tokens that each go to 4 experts, of 8 or of 64, drawn evenly; then beside one dense
product of the same FLOPs. bfloat16 with float32 gradients of the weights, float32 on a CPU, where the second part takes
minutes and is left out unless `--tiny`. The results are held against float64 on the CPU; exit status 1 if they are
wrong. `--described` compiles the first part for an H100 that is only described
instead (needs the extra `cuda12` or `cuda13`), and runs nothing: FLOPs by cost.py, workspace by `memory_analysis`.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cost
import hlo
import jax
import jax.numpy as jnp
import numpy as np
from gpu_programs import described
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from synthetic import measured, median_seconds

from models.grouped import grouped_dot, pick
from models.layers import dot
from models.weight import Weight

CASES = ((8, 4096, 4096, 14336), (128, 8192, 2048, 768))  # experts, rows, features, hidden: Mixtral's, Qwen3-MoE's
ACTIVE, FEW, MANY = 4, 8, 64  # experts
SIZES, TINY = (4096, 512, 1024), (64, 16, 32)  # tokens, features, hidden


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--described", action="store_true")
    parser.add_argument("--repeats", type=int, default=6)
    flags = parser.parse_args()
    sizes = TINY if flags.tiny else SIZES
    print("{} tokens, {} x {} features, {} active experts, forward and backward".format(*sizes, ACTIVE))
    found: list[dict[str, Any]] = [compiled(*sizes) if flags.described else active(*sizes, flags.repeats)]
    if not flags.described and (flags.tiny or jax.default_backend() != "cpu"):
        found += [beside_dense(*((8, 64, 16, 32) if flags.tiny else case)) for case in CASES]
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))
    return 0 if found[0].get("right", True) else 1


def dtype() -> Any:
    """Of activations."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def drawn(experts: int, tokens: int) -> np.ndarray:
    """Rows of each expert, where each token goes to different ones."""
    chosen = np.argsort(np.random.default_rng(experts).random((tokens, experts)), 1)[:, :ACTIVE]
    return np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int32)


def both(
    x: jax.Array, w: jax.Array, tap: jax.Array, g: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The product and its gradients, of the weights in the precision of `tap`, as in a training step."""
    y, pull = jax.vjp(lambda x, tap: grouped_dot(x, Weight(w, tap, w.shape), sizes), x, tap)
    return y, *pull(g)


def active(tokens: int, features: int, hidden: int, repeats: int) -> dict[str, Any]:
    """Time with few and with many experts, in turns."""
    x = jax.random.normal(jax.random.key(0), (tokens * ACTIVE, features), dtype())
    g = jax.random.normal(jax.random.key(1), (tokens * ACTIVE, hidden), dtype())
    program, runs, errors = jax.jit(both), {}, {}
    for experts in (FEW, MANY):
        w = jax.random.normal(jax.random.key(2), (experts, features, hidden), dtype())
        given = x, w, w.astype(jnp.float32), g, jnp.asarray(drawn(experts, tokens))
        pairs = zip(program(*given), defined(*given), strict=True)
        errors[experts] = [float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)) for a, b in pairs]
        runs[str(experts)] = functools.partial(lambda given: jax.block_until_ready(program(*given)), given)
    times = measured(runs, repeats=repeats)
    for experts, time in times.items():
        print(f"  {experts:>3} experts  CPU time {1e3 * time.cpu:9.2f} ms  wall {1e3 * time.wall:9.2f} ms")
    few, many = times[str(FEW)], times[str(MANY)]
    ratio = {"cpu": many.cpu / few.cpu, "wall": many.wall / few.wall}
    print(f"  ratio of CPU time {ratio['cpu']:.2f}, of wall time {ratio['wall']:.2f}", flush=True)
    worst = max(map(max, errors.values()))
    print(f"  error of product and gradients against float64: {worst:.1e}", flush=True)
    found = {"times": {experts: time._asdict() for experts, time in times.items()}, "ratio": ratio}
    return found | {"errors": errors, "right": worst < (1e-5 if dtype() == jnp.float32 else 2e-2)}


def defined(
    x: jax.Array, w: jax.Array, tap: jax.Array, g: jax.Array, sizes: jax.Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `both` should be, in float64."""
    xs, ws, gs = (np.asarray(a).astype(np.float64) for a in (x, w, g))
    rows = np.split(np.arange(len(xs)), np.cumsum(np.asarray(sizes))[:-1])
    y = np.concatenate([xs[r] @ m for r, m in zip(rows, ws, strict=True)])
    g_x = np.concatenate([gs[r] @ m.T for r, m in zip(rows, ws, strict=True)])
    return y, g_x, np.stack([xs[r].T @ gs[r] for r in rows])


def compiled(tokens: int, features: int, hidden: int) -> dict[str, Any]:
    """FLOPs and workspace with few and with many experts on a described H100, in bfloat16."""
    mesh = jax.sharding.Mesh(described("1x1x1"), ("device",))
    abstract = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    program = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P(), out_specs=P()))
    rows, found = tokens * ACTIVE, {}
    for experts in (FEW, MANY):
        x, g = abstract(jnp.bfloat16, rows, features), abstract(jnp.bfloat16, rows, hidden)
        w, tap = (abstract(dtype, experts, features, hidden) for dtype in (jnp.bfloat16, jnp.float32))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            form = str(pick(x, w) or "the kernels of tokamax")
        built = program.lower(x, w, tap, g, abstract(jnp.int32, experts)).compile()
        flops = sum(op.times * op.flops for op in cost.costs(hlo.parse(built.as_text())))
        workspace = built.memory_analysis().temp_size_in_bytes
        found[experts] = {"form": form, "flops": flops, "workspace": workspace}
        each, mib = flops / (6 * rows * features * hidden), workspace / 2**20
        print(f"  {experts:>3} experts  FLOPs {each:.2f} of the active ones', workspace {mib:.1f} MiB: {form}")
    ratio = {name: found[MANY][name] / found[FEW][name] for name in ("flops", "workspace")}
    print(f"  ratio of FLOPs {ratio['flops']:.2f}, of workspace {ratio['workspace']:.2f}", flush=True)
    return {"programs": found, "ratio": ratio}


def beside_dense(experts: int, rows: int, features: int, hidden: int) -> dict[str, Any]:
    """Milliseconds of each product, grouped and dense, and the ratio of their sums."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, features), dtype())
    w = jax.random.normal(keys[1], (experts, features, hidden), dtype())
    g = jax.random.normal(keys[2], (rows, hidden), dtype())
    sizes = jnp.full(experts, rows // experts, jnp.int32)
    forms = {"grouped": (lambda x, w: grouped_dot(x, w, sizes), w), "dense": (dot, w[0])}
    runs = {f"{name} {part}": run for name, (form, w) in forms.items() for part, run in products(form, x, w, g).items()}
    ms = {name: 1e3 * seconds for name, seconds in median_seconds(runs, repeats=5).items()}
    total = {name: sum(v for key, v in ms.items() if key.startswith(name)) for name in forms}
    ratio = total["grouped"] / total["dense"]
    print(f"{experts} experts, {rows} rows: {ratio:.2f} of the dense products")
    print(*(f"  {name:<22} {taken:9.3f} ms" for name, taken in ms.items()), sep="\n", flush=True)
    return {"experts": experts, "rows": rows, "ms": ms, "ratio": ratio}


def products(form: Callable[..., jax.Array], x: jax.Array, w: jax.Array, g: jax.Array) -> dict[str, Callable[[], Any]]:
    """The product and its two gradients, that of the weights in float32, each a program of its own."""
    programs = {
        "forward": jax.jit(lambda x, w, tap, g: form(x, w)),
        "gradient of x": jax.jit(lambda x, w, tap, g: jax.vjp(lambda x: form(x, w), x)[1](g)),
        "gradient of w": jax.jit(lambda x, w, tap, g: jax.vjp(lambda tap: form(x, Weight(w, tap, w.shape)), tap)[1](g)),
    }
    given = x, w, w.astype(jnp.float32), g
    return {name: functools.partial(lambda f: jax.block_until_ready(f(*given)), f) for name, f in programs.items()}


if __name__ == "__main__":
    sys.exit(main())
