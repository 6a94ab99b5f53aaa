"""What each way in which attention reaches over cp keeps, needs and computes: a decoder's programs on emulated devices.

    python benchmarks/context.py [--cp 4] [--tokens 16384] [--time]

A row of `tokens`, packed or not, float32, cut over `cp` devices, nothing rematerialised. Residuals and workspace are
per device, of `memory_analysis`; heads of 32 features, 8 of queries, 2 of keys. `--time` runs forward and backward of
attention alone, whose CPU time is that of all devices together.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from synthetic import emulate, one_row

from hetjax.core.layout import Layout, zigzag
from hetjax.core.remat import Remat
from models.axes import Axes, Axis
from models.context import CONTEXTS, attend_across, prepared
from models.decoder import Decoder
from models.sight import Sight

MODEL = Decoder(vocab_size=512, width=256, num_layers=4, num_heads=8, num_kv_heads=2, mlp_width=768)


def seconds(context: str, cp: int, tokens: int) -> float:
    """CPU time of attention, forward and backward, on all devices: one row of four documents."""
    mesh, axes = Mesh(np.array(jax.devices()[:cp]), ("cp",)), Axes(cp=Axis(("cp",), cp), context=context)
    heads, features = MODEL.num_heads, MODEL.head_features

    def program(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        keys = (axes.cp.gather(x, 1) for x in (positions, segments))
        sight = prepared(Sight(positions, segments, *keys, zigzag=cp), axes)
        y, pull = jax.vjp(lambda *given: attend_across(*given, sight, axes), q, k, v)
        return pull(y)

    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P(None, "cp"), out_specs=P(None, "cp")))
    place, order, rng = np.arange(tokens, dtype=np.int32), zigzag(tokens, cp), np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, tokens, h, features)).astype(np.float32) for h in (heads, *[MODEL.num_kv_heads] * 2))
    row = (place % (tokens // 4))[None, order], (place // (tokens // 4) + 1)[None, order]
    jax.block_until_ready(run(q, k, v, *row))
    before = time.process_time()
    jax.block_until_ready(run(q, k, v, *row))
    return time.process_time() - before


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--time", action="store_true")
    flags = parser.parse_args()
    emulate(8)
    print(f"cp {flags.cp}, {flags.tokens} tokens; MiB per device")
    print(
        f"{'context':<8} {'residuals':>9} {'forward':>8} {'backward':>8}"
        + (" CPU s of attention" if flags.time else "")
    )
    for context in CONTEXTS:
        layout = Layout(cp=flags.cp, context=context)
        stage = one_row(MODEL.module(jnp.float32), layout, Remat.NONE, flags.tokens, jax.devices())
        kept = sum(np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in stage.kept)
        sizes = [kept, *(stage.memory[p].temp_size_in_bytes for p in ("forward", "backward"))]
        line = f"{context:<8} {sizes[0] / 2**20:>9.1f} {sizes[1] / 2**20:>8.1f} {sizes[2] / 2**20:>8.1f}"
        print(line + (f" {seconds(context, flags.cp, flags.tokens):>8.2f}" if flags.time else ""), flush=True)


if __name__ == "__main__":
    main()
