"""Predicts time and MFU of a training step on an H100 from its compiled programs, and checks them. No GPU is needed.

    python benchmarks/roofline.py [--case 1b 3b vlm] [--remat auto] [--gpu h100|h200] [--json FILE]

The cases are those of mfu.py: 1B and 3B decoders at 4k tokens and a VLM, bfloat16 with float32 AdamW, compiled for an
H100 with 80 GB, or an H200 with 141, that is only described (needs the extra `cuda12` or `cuda13`). Every operation
takes as long as its FLOPs or its bytes at the rates of cost.py, whatever is slower. Each case is then checked: it fits,
no gradient is filled with zeros or stacked beside the accumulators, at most 16 bytes move per parameter and microbatch
for gradients, no loop makes narrow copies of weights, and at least 55% MFU are predicted. The exit status is 1 if a
check fails.
"""

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from cost import H100, H200, Cost, Rates
from gpu_programs import described
from gradients import Traffic, narrowed, traffic
from mfu import CASES, step_flops, workload
from predict import Ran, programs, seconds

from hetjax.core import flops, memory
from hetjax.core.layout import Layout
from hetjax.core.remat import Remat

KIND = "NVIDIA H100"
GPUS = {"h100": (H100, 84_942_979_072), "h200": (H200, 150_110_000_000)}  # rates, bytes of memory
MOST_BYTES, LEAST_MFU = 16.0, 0.55


class Check(NamedTuple):
    """A property, what was found, and whether it holds."""

    name: str
    found: str
    good: bool


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="+", default=["1b", "3b", "vlm"])
    parser.add_argument("--remat", choices=[r.value for r in Remat], default="auto")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    found = [case(name, flags.remat, *GPUS[flags.gpu]) for name in flags.case]
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))
    return 0 if all(check["good"] for row in found for check in row["checks"]) else 1


def case(name: str, remat: str, rates: Rates, capacity: int) -> dict[str, Any]:
    """Compiles, predicts, checks and prints one case on a device of `capacity` bytes."""
    work = workload(name, remat, tiny=False)
    trainer = work.trainer(Layout(), devices=described("1x1x1"), available={0: capacity})
    ran, [used] = programs(trainer), memory.estimate(trainer).values()
    took, peak = seconds(ran, rates), flops.peak_flops(KIND) or 0.0
    mfu, causal = (f / took / peak for f in step_flops(work))
    print(f"{name}, remat {remat}: {took:.3f} s, MFU {mfu:.1%} (causal {causal:.1%}), {used.total / 2**30:.1f} GiB")
    for r in ran:
        kinds = (f"{kind} {1e3 * r.seconds(rates, kind):.1f}" for kind in ("products", "attention", "memory"))
        print(f"  {r.calls} x {r.stage} {r.name:<9} {1e3 * r.seconds(rates):8.1f} ms: {', '.join(kinds)}")
    shown = dearest(ran, rates, ("products", "attention"), most=4) + dearest(ran, rates, ("memory",), most=10)
    for row in shown:
        print("  {share:6.1%} {milliseconds:8.1f} ms {program:<17} {times:>3} x {name:<34} {source}".format(**row))
    checks = judge(ran, used.total, capacity, mfu)
    for check in checks:
        print(f"  {'pass' if check.good else 'FAIL'}  {check.name}: {check.found}", flush=True)
    return {
        "case": name,
        "remat": remat,
        "seconds": took,
        "mfu": mfu,
        "mfu_causal": causal,
        "bytes": used.total,
        "dearest": shown,
        "checks": [check._asdict() for check in checks],
    }


def dearest(ran: list[Ran], rates: Rates, kinds: Collection[str], *, most: int) -> list[dict[str, Any]]:
    """The operations of these kinds that take longest in a step."""
    total = seconds(ran, rates)
    took = lambda r, c: r.calls * c.seconds(rates)
    pairs: list[tuple[Ran, Cost]] = [(r, c) for r in ran for c in r.costs if c.kind in kinds]
    pairs.sort(key=lambda pair: -took(*pair))
    return [
        {
            "program": f"{r.stage} {r.name}",
            "name": c.operation.name,
            "source": "/".join(c.operation.source.split("/")[-3:]),
            "times": r.calls * c.times,
            "milliseconds": 1e3 * took(r, c),
            "share": took(r, c) / total,
        }
        for r, c in pairs[:most]
    ]


def judge(ran: list[Ran], used: int, capacity: int, mfu: float) -> list[Check]:
    """The checks of one case."""
    moved: dict[str, Traffic] = {r.stage: traffic(r.program) for r in ran if r.name == "backward"}
    worst = max(moved.values(), key=lambda t: t.bytes_per_parameter)
    most = worst.bytes_per_parameter
    fills = [f"{stage}: {fill}" for stage, t in moved.items() for fill in t.fills]
    seconds = [f"{stage}: {array}" for stage, t in moved.items() for array in t.seconds]
    narrow = [f"{r.stage} {r.name}: {name}" for r in ran if r.calls > 1 for name in narrowed(r.program)]
    return [
        Check("fits", f"{used / 2**30:.1f} of {capacity / 2**30:.1f} GiB", used <= capacity),
        Check("no gradient is filled with zeros", listed(fills), not fills),
        Check("no second stack of gradients", listed(seconds), not seconds),
        Check(
            f"at most {MOST_BYTES:.0f} bytes per parameter and microbatch",
            f"{most:.2f}, most above by {worst.dearest}",
            most <= MOST_BYTES,
        ),
        Check("no narrow copy of a weight in a loop", listed(narrow), not narrow),
        Check(f"at least {LEAST_MFU:.0%} MFU", f"{mfu:.1%}", mfu >= LEAST_MFU),
    ]


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


if __name__ == "__main__":
    sys.exit(main())
