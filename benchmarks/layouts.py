"""Step time of one model under homogeneous, colocated and disjoint layouts, against the FLOPs that each executes.

    python benchmarks/layouts.py [--repeats 3]

A homogeneous encoder repeats its work over the language model's cp; its own layout does not. On emulated CPU devices
the cores are shared: a step takes as long as all devices' FLOPs together, so the ratios should be those of the FLOPs.
On a machine that others use the CPU time is the figure. With one picture per device an encoder is bound by the bytes of
its weights and accumulators, not by FLOPs; the last case has four.
"""

import argparse

from synthetic import Timed, Workload, emulate, measured

from hetjax.core import flops
from hetjax.core.layout import Layout, like
from models.decoder import Decoder
from models.vit import ViT

# `vision` is the encoder's width and layers, `heads` those of the language model and of the encoder, else 8. The
# encoder's share of the language model's FLOPs is computed and printed.
CASES = {
    "short context": dict(samples=8, pictures=16, seq_len=256, llm=Layout(dp=4, tp=2), vision=(256, 2)),
    "long context, small encoder": dict(samples=2, pictures=8, seq_len=1024, llm=Layout(dp=2, cp=4), vision=(168, 2)),
    "long context, large encoder": dict(samples=2, pictures=8, seq_len=1024, llm=Layout(dp=2, cp=4), vision=(288, 4)),
    "four pictures a device": dict(samples=2, pictures=32, seq_len=4096, llm=Layout(dp=2, cp=4), vision=(288, 4)),
    "four pictures a device, heads of 128 and 72 features": dict(
        samples=2, pictures=32, seq_len=4096, llm=Layout(dp=2, cp=4), vision=(288, 4), heads=(2, 4)
    ),
}


def main() -> None:
    """Prints one table per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    emulate(8)
    for name, case in CASES.items():
        width, layers = case["vision"]
        heads, vision_heads = case.get("heads", (8, 8))
        work = Workload(
            llm=Decoder(
                vocab_size=512, width=256, num_layers=4, num_heads=heads, num_kv_heads=heads // 2, mlp_width=768
            ),
            vision=ViT(
                image_size=64,
                patch_size=8,
                width=width,
                num_layers=layers,
                num_heads=vision_heads,
                mlp_width=4 * width,
                output_width=256,
            ),
            samples=case["samples"],
            seq_len=case["seq_len"],
            pictures=case["pictures"],
            num_microbatches=2,
        )
        table(name, work, case["llm"], repeats)


def table(name: str, work: Workload, llm: Layout, repeats: int) -> None:
    """The three placements of one case, relative to the homogeneous one."""
    half = Layout(dp=llm.dp if llm.cp > 1 else llm.dp // 2, cp=max(1, llm.cp // 2), tp=llm.tp, devices="0-3")
    layouts = {
        "homogeneous": (llm, like(llm)),
        "colocated": (llm, Layout(dp=8)),
        "disjoint": (half, Layout(dp=4, devices="4-7")),
    }
    executed = {n: executed_flops(work, vision.copies) for n, (_, vision) in layouts.items()}
    runs = {n: Timed(work.trainer(*pair), work.step()) for n, pair in layouts.items()}
    times = measured(runs, repeats=repeats)
    share = encoder_flops(work) / llm_flops(work)
    rows = f"{work.num_microbatches} x {work.samples} rows of {work.seq_len}"
    print(f"\n{name}: encoder {share:.0%} of the language model's FLOPs; {rows}")
    print("placement    llm                vision             wall s  ratio   CPU s  ratio  FLOPs' ratio")
    base = times["homogeneous"]
    for n, (a, b) in layouts.items():
        wall, cpu = times[n]
        of_base = wall / base.wall, cpu / base.cpu, executed[n] / executed["homogeneous"]
        numbers = f"{wall:6.3f}  {of_base[0]:5.2f}  {cpu:6.3f}  {of_base[1]:5.2f}  {of_base[2]:12.2f}"
        print(f"{n:<12} {a!s:<18} {b!s:<18} {numbers}", flush=True)


def encoder_flops(work: Workload) -> float:
    """Training FLOPs of the encoder in a step, done once."""
    return flops.training(flops.vit_forward(work.vision)).total_non_causal * work.pictures * work.num_microbatches


def llm_flops(work: Workload) -> float:
    """Training FLOPs of the language model in a step; attention as the mask leaves it."""
    tokens = work.samples * work.seq_len * work.num_microbatches
    return flops.training(flops.decoder_forward(work.llm, work.seq_len)).total * tokens


def executed_flops(work: Workload, copies: int) -> float:
    """FLOPs of all devices together."""
    return llm_flops(work) + copies * encoder_flops(work)


if __name__ == "__main__":
    main()
