"""MFU of training steps at 4k tokens on one accelerator, and where the time goes: the dearest kernels by name.

    python benchmarks/mfu.py [--case 1b|3b|8b_slice|vlm] [--remat auto|full|dots|none] [--documents 1] [--repeats 5]
                             [--json FILE] [--tiny]

bfloat16 with float32 weights, gradients and AdamW. Two figures: 6 FLOPs per parameter and token plus attention in full
(as most papers count), and with the half of attention that a causal mask leaves. `8b_slice` is 8 of the 32 layers of an
8B model; `vlm` a vision encoder of 1B in front of a decoder of 3B, four pictures a row. `--documents` packs as many
into each row, where attention counts as for one. Beside the measured time stands the one that predict.py says. `--tiny`
runs the same with small sizes anywhere, where MFU means nothing.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import predict
from dearest import Kernels, read_trace
from synthetic import Timed, Workload, median_seconds

from hetjax.core import flops
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from models.decoder import Decoder
from models.vit import ViT

DECODERS = {
    "1b": Decoder(
        vocab_size=32000, width=2048, num_layers=16, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=8192
    ),
    "3b": Decoder(vocab_size=32000, width=3072, num_layers=28, num_heads=24, num_kv_heads=8, mlp_width=8192),
    "8b": Decoder(vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_width=14336),
}
TOWER = ViT(image_size=224, patch_size=14, width=1408, num_layers=40, num_heads=16, mlp_width=6144, output_width=3072)
CASES = {  # the language model, the encoder, rows of a microbatch
    "1b": (DECODERS["1b"], None, 4),
    "3b": (DECODERS["3b"], None, 2),
    "8b_slice": (dataclasses.replace(DECODERS["8b"], num_layers=8), None, 2),
    "vlm": (DECODERS["3b"], TOWER, 2),
}
PICTURES = 4  # of a row


def workload(case: str, remat: str, *, tiny: bool, documents: int = 1) -> Workload:
    """What is trained; `documents` in each row."""
    llm, vision, rows = CASES[case]
    if tiny:
        llm = dataclasses.replace(llm, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128)
        if vision is not None:
            vision = dataclasses.replace(
                vision, image_size=28, width=32, num_layers=2, num_heads=2, mlp_width=64, output_width=64
            )
    return Workload(
        llm=llm,
        vision=vision,
        samples=rows,
        seq_len=64 if tiny else 4096,
        pictures=PICTURES * rows,
        num_microbatches=4,
        dtype=jnp.bfloat16,
        remat=Remat(remat),
        optimizer=OptimizerConfig(name="adamw", clip_norm=1.0),
        documents=documents,
    )


def main() -> None:
    """Prints seconds, tokens per second, MFU and memory, then the kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="1b")
    parser.add_argument("--remat", choices=[r.value for r in Remat], default="full")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    work = workload(flags.case, flags.remat, tiny=flags.tiny, documents=flags.documents)
    found = {"case": flags.case, "remat": flags.remat, "documents": flags.documents, **measure(work, flags.repeats)}
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))
    print(
        "{case}, remat {remat}, {documents} document(s) a row, {device}: {seconds:.3f} s, "
        "{tokens_per_second:,.0f} tokens/s, {peak_gib:.1f} GiB at most".format(**found)
    )
    if found["mfu"] is not None:
        print("MFU, attention in full: {mfu:.1%}; its causal half: {mfu_causal:.1%}".format(**found))
        print("predicted by roofline.py's rates: {predicted_seconds:.3f} s".format(**found))
    print("device busy {busy:.1%} of the traced step".format(**found))
    for kernel in found["kernels"]:
        print("  {share:6.1%} {milliseconds:9.2f} ms {calls:6d} x  {name}".format(**kernel))


def measure(work: Workload, repeats: int) -> dict[str, Any]:
    """All figures of one case."""
    trainer = work.trainer(Layout())
    predicted = predict.seconds(predict.programs(trainer), predict.rates(jax.devices()[0].device_kind))
    run = Timed(trainer, work.step())
    seconds = median_seconds({"step": run}, repeats=repeats)["step"]
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        kernels = read_trace(Path(directory))
    device = jax.devices()[0]
    total, causal = step_flops(work)
    peak = flops.peak_flops(device.device_kind)
    return {
        "device": device.device_kind,
        "seconds": seconds,
        "predicted_seconds": predicted,
        "tokens_per_second": work.samples * work.seq_len * work.num_microbatches / seconds,
        "flops": total,
        "flops_causal": causal,
        "mfu": None if peak is None else total / seconds / peak,
        "mfu_causal": None if peak is None else causal / seconds / peak,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        **_summary(kernels),
    }


def step_flops(work: Workload) -> tuple[float, float]:
    """FLOPs of a step with attention in full, and with its causal half."""
    tokens = work.samples * work.seq_len * work.num_microbatches
    step = flops.training(flops.decoder_forward(work.llm, work.seq_len)) * tokens
    if work.vision is not None:
        step += flops.training(flops.vit_forward(work.vision)) * (work.pictures * work.num_microbatches)
    return step.total_non_causal, step.total


def _summary(kernels: Kernels, most: int = 10) -> dict[str, Any]:
    """The share of time in which the device is busy, and the dearest kernels."""
    dearest = sorted(kernels.seconds.items(), key=lambda item: -item[1])[:most]
    total = sum(kernels.seconds.values()) or 1.0
    listed = [
        {"name": name[:120], "milliseconds": 1e3 * s, "share": s / total, "calls": kernels.calls[name]}
        for name, s in dearest
    ]
    return {"busy": kernels.busy_seconds / (kernels.span_seconds or 1.0), "kernels": listed}


if __name__ == "__main__":
    main()
