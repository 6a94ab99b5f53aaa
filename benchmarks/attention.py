"""Attention kernels side by side: time, FLOP/s and workspace, causal, forward and backward, in one run.

    python benchmarks/attention.py [--seq_len 512 1024 2048 4096 8192] [--blocks 64 128 256] [--rows 1] [--packed]
                                   [--heads 8 4 64] [--json FILE]

`whole` holds all weights in memory, `blocks` are those of models/blockwise.py. On a GPU also cuDNN (for packed rows by
offsets that jax keeps private) and, where they serve, the kernels of models/fused.py. float32 on a CPU, bfloat16
elsewhere. Memory is the workspace of the compiled program. The figures in models/attention.py come from here.
"""

import argparse
import concurrent.futures
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from synthetic import median_seconds

from models.attention import whole
from models.blockwise import blockwise
from models.fused import FEATURES, TILE, fused, refusal
from models.sight import Sight

DOCUMENTS = 8  # in a packed row
LARGEST = 8 << 30  # bytes of workspace beyond which nothing is run

Form = Callable[[jax.Array, jax.Array, jax.Array, Sight], jax.Array]


class Program(NamedTuple):
    """One form at one length, compiled."""

    workspace: int  # bytes
    run: Callable[[], Any]


def main() -> None:
    """Prints a line per length and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--blocks", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 4, 64], metavar=("HEADS", "KV_HEADS", "FEATURES"))
    parser.add_argument("--packed", action="store_true", help=f"{DOCUMENTS} documents in a row, instead of one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    documents = DOCUMENTS if flags.packed else 1
    print(f"{jax.devices()[0].device_kind}, {flags.rows} row(s) of {documents} document(s), heads {flags.heads}")
    print("tokens  attention         ms  TFLOP/s   MiB")
    made = forms(flags.blocks, flags.packed)
    fits = lambda name, s: name != "whole" or 4 * flags.rows * flags.heads[0] * s * s <= LARGEST
    keys = [(seq_len, name) for seq_len in flags.seq_len for name in made if fits(name, seq_len)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiling = {
            key: pool.submit(program, made[key[1]], flags.rows, key[0], flags.heads, flags.packed) for key in keys
        }
    found = []
    for seq_len in flags.seq_len:
        found += report(seq_len, {name: compiling[key] for key in keys for s, name in [key] if s == seq_len}, flags)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


def forms(blocks: list[int], packed: bool) -> dict[str, Form]:
    """Name -> kernel, of what can run here."""
    found: dict[str, Form] = {"whole": whole}
    found |= {f"blocks of {n}": functools.partial(blockwise, block=n) for n in blocks}
    return found | candidates(packed)


def candidates(packed: bool) -> dict[str, Form]:
    """Kernels of libraries, where they can run."""
    if jax.default_backend() != "gpu":
        return {}
    found: dict[str, Form] = {"cuDNN": _cudnn_packed if packed else _cudnn}
    wanted = jax.ShapeDtypeStruct((1, TILE, 1, FEATURES[0]), jnp.bfloat16)
    if refusal(wanted, wanted, jax.devices()[0].device_kind) is None:
        found["fused"] = fused
    return found


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_packed(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    numbers = jnp.arange(1, DOCUMENTS + 1, dtype=jnp.int32)
    lengths = (sight.segments[:, None, :] == numbers[None, :, None]).sum(-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, 1, dtype=jnp.int32) - lengths
    starts, lengths = (jnp.where(lengths > 0, a, -1) for a in (starts, lengths))
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return cudnn.dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets,
        scale=1 / math.sqrt(q.shape[-1]), mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def program(form: Form, rows: int, seq_len: int, heads: list[int], packed: bool) -> Program:
    """Forward and backward of one form on random rows."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, seq_len, n, heads[2]) for n in (heads[0], heads[1], heads[1], heads[0])]
    given = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    length = seq_len // DOCUMENTS if packed else seq_len
    place = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (rows, seq_len))
    places = place % length, place // length + 1
    sight = Sight(*places, *places, zigzag=1).ranged()

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, sight: Sight) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda q, k, v: form(q, k, v, sight), q, k, v)
        return y, *pull(g)

    compiled = jax.jit(both).lower(*given, sight).compile()
    workspace = compiled.memory_analysis().temp_size_in_bytes
    return Program(workspace, lambda: jax.block_until_ready(compiled(*given, sight)))


def report(
    seq_len: int, compiling: dict[str, concurrent.futures.Future[Program]], flags: argparse.Namespace
) -> list[dict[str, Any]]:
    """The lines of one length; a form that needs too much memory has no time, one that fails says why."""
    failed = {name: str(future.exception()) for name, future in compiling.items() if future.exception()}
    programs = {name: future.result() for name, future in compiling.items() if name not in failed}
    fitting = {name: made.run for name, made in programs.items() if made.workspace <= LARGEST}
    seconds = median_seconds(fitting, repeats=flags.repeats)
    documents, (heads, _, features) = DOCUMENTS if flags.packed else 1, flags.heads
    flops = 3 * 4 * flags.rows * heads * features * seq_len * (seq_len / documents) / 2  # the causal half
    found = []
    for name in compiling:
        if name in failed:
            print(f"{seq_len:>6}  {name:<13} {failed[name][:200]!r}", flush=True)
            found.append({"tokens": seq_len, "form": name, "packed": flags.packed, "error": failed[name][:500]})
            continue
        mib, time = programs[name].workspace / 2**20, seconds.get(name)
        shown = "        -         -" if time is None else f"{1e3 * time:9.3f}  {flops / time / 1e12:8.2f}"
        print(f"{seq_len:>6}  {name:<13} {shown}  {mib:8.0f}", flush=True)
        found.append({"tokens": seq_len, "form": name, "packed": flags.packed, "seconds": time, "mib": mib})
    return found


if __name__ == "__main__":
    main()
