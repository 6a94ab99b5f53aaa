"""MFU of decoders at 4k tokens on one accelerator, in bfloat16: causal attention counted as half, and in full.

    python benchmarks/mfu.py [--size 1b|7b] [--repeats 10]

Needs a device whose peak `hetjax.core.flops` knows. A 7B model with float32 weights and gradients needs some 60 GiB.
"""

import argparse

import jax
import jax.numpy as jnp
from synthetic import Timed, Workload, median_seconds

from hetjax.core import flops
from hetjax.core.graph import Remat
from hetjax.core.layout import Layout
from models.decoder import Decoder
from models.vit import ViT

SIZES = {
    "1b": Decoder(
        vocab_size=32000, width=2048, num_layers=16, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=8192
    ),
    "7b": Decoder(vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_width=14336),
}


def main() -> None:
    """Prints seconds, tokens per second and both figures of MFU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    flags = parser.parse_args()
    kind = jax.devices()[0].device_kind
    peak = flops.peak_flops(kind)
    if peak is None:
        raise SystemExit(f"error: the peak of {kind!r} is not known; MFU needs an accelerator of hetjax.core.flops")
    llm = SIZES[flags.size]
    work = Workload(
        llm=llm,
        vision=ViT(
            image_size=28, patch_size=14, width=64, num_layers=1, num_heads=2, mlp_width=64, output_width=llm.width
        ),
        samples=flags.rows,
        seq_len=4096,
        pictures=flags.rows,
        num_microbatches=4,
        dtype=jnp.bfloat16,
        remat=Remat.FULL,
    )
    run = Timed(work.trainer(Layout(), Layout()), work.step())
    seconds = median_seconds({"step": run}, repeats=flags.repeats)["step"]
    tokens = work.samples * work.seq_len * work.num_microbatches
    per_token = flops.training(flops.decoder_forward(llm, work.seq_len))
    print(f"{kind}: {flags.size}, {seconds:.3f} s, {tokens / seconds:,.0f} tokens/s")
    print(f"MFU, causal attention counted as half: {per_token.total * tokens / seconds / peak:.1%}")
    print(f"MFU, attention counted in full:        {per_token.total_non_causal * tokens / seconds / peak:.1%}")


if __name__ == "__main__":
    main()
