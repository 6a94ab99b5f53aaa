"""Attention with all its weights in memory against attention in blocks: time and memory, in one run.

    python benchmarks/attention.py [--seq_len 512 1024 2048 4096 8192] [--blocks 64 128 256] [--rows 1] [--packed]

Causal, forward and backward, 8 heads of 64 features over 4 key-value heads; float32 on a CPU, bfloat16 elsewhere.
Memory is the workspace of the compiled program. The figures in models/attention.py come from here.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from synthetic import median_seconds

from models.attention import whole
from models.blockwise import blockwise
from models.sight import Sight

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
DOCUMENTS = 8  # in a packed row
LARGEST = 8 << 30  # bytes of workspace beyond which nothing is run

Form = Callable[[jax.Array, jax.Array, jax.Array, Sight], jax.Array]


def main() -> None:
    """Prints a line per length and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--packed", action="store_true", help=f"{DOCUMENTS} documents in a row, instead of one")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, rows of {DOCUMENTS if flags.packed else 1} document(s), {flags.rows} at once"
    )
    print("tokens  attention    seconds  of whole   MiB  of whole")
    forms: dict[str, Form] = {"whole": whole}
    forms |= {f"blocks of {n}": functools.partial(blockwise, block=n) for n in flags.blocks}
    for seq_len in flags.seq_len:
        report(seq_len, {name: program(form, flags.rows, seq_len, flags.packed) for name, form in forms.items()}, flags)


def program(form: Form, rows: int, seq_len: int, packed: bool) -> tuple[int, Callable[[], None]]:
    """(bytes of workspace, forward and backward of one form on random rows)."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(rows, seq_len, n, HEAD_DIM) for n in heads]
    given = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    length = seq_len // DOCUMENTS if packed else seq_len
    place = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (rows, seq_len))
    places = place % length, place // length + 1

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *places: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda q, k, v: form(q, k, v, Sight(*places, *places)), q, k, v)
        return y, *pull(g)

    compiled = jax.jit(both).lower(*given, *places).compile()
    workspace = compiled.memory_analysis().temp_size_in_bytes
    return workspace, lambda: jax.block_until_ready(compiled(*given, *places))


def report(seq_len: int, programs: dict[str, tuple[int, Callable[[], None]]], flags: argparse.Namespace) -> None:
    """The lines of one length; a form that needs too much memory has no time."""
    fitting = {name: run for name, (workspace, run) in programs.items() if workspace <= LARGEST}
    seconds = median_seconds(fitting, repeats=flags.repeats)
    for name, (workspace, _) in programs.items():
        time = f"{seconds[name]:9.4f}" if name in seconds else "        -"
        ratio = f"{seconds[name] / seconds['whole']:8.2f}" if {name, "whole"} <= seconds.keys() else "       -"
        size = f"{workspace / 2**20:8.0f}  {workspace / programs['whole'][0]:8.3f}"
        print(f"{seq_len:>6}  {name:<13} {time}  {ratio}  {size}", flush=True)


if __name__ == "__main__":
    main()
