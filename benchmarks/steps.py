"""Times a step of one case with the hetjax, and the `synthetic.py`, that PYTHONPATH names: a process of `compare.py`.

    PYTHONPATH=CHECKOUT:CHECKOUT/benchmarks python -P benchmarks/steps.py CASE [--repeats 3] [--json FILE]

It uses nothing that a checkout may lack: sizes of models, layouts by their axes, `Workload`, `Timed` and `emulate`.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from synthetic import Layout, Timed, Workload, emulate

from models.decoder import Decoder
from models.vit import ViT

SMALL = dict(
    llm=Decoder(vocab_size=4096, width=512, num_layers=6, num_heads=8, num_kv_heads=4, mlp_width=1536),
    vision=ViT(image_size=112, patch_size=14, width=256, num_layers=4, num_heads=8, mlp_width=1024, output_width=512),
    samples=4,
    seq_len=256,
    pictures=4,
    num_microbatches=1,
)
LONG = dict(
    llm=Decoder(vocab_size=512, width=256, num_layers=4, num_heads=8, num_kv_heads=4, mlp_width=768),
    vision=ViT(image_size=64, patch_size=8, width=288, num_layers=4, num_heads=8, mlp_width=1152, output_width=256),
    samples=2,
    seq_len=1024,
    pictures=8,
    num_microbatches=2,
)
QUICKSTART = dict(
    llm=Decoder(vocab_size=32, width=128, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=256),
    vision=ViT(image_size=64, patch_size=16, width=128, num_layers=3, num_heads=4, mlp_width=256, output_width=128),
    samples=32,
    seq_len=30,
    pictures=32,
    num_microbatches=2,
)
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {  # sizes, devices, llm, encoder
    "one": (SMALL, 1, {}, {}),
    "homogeneous": (LONG, 8, dict(dp=2, cp=4), dict(dp=2, copies=4)),
    "colocated": (LONG, 8, dict(dp=2, cp=4), dict(dp=8)),
    "colocated x4": ({**LONG, "pictures": 32}, 8, dict(dp=2, cp=4), dict(dp=8)),
    "disjoint": (LONG, 8, dict(dp=2, cp=2, devices="0-3"), dict(dp=4, devices="4-7")),
    "quickstart": (QUICKSTART, 4, dict(tp=2, devices="2-3"), dict(dp=2, devices="0-1")),
}


def main() -> None:
    """Prints the least CPU and wall seconds of a step, and the seconds of building and compiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    sizes, devices, llm, vision = CASES[flags.case]
    emulate(devices)
    work = Workload(**sizes)
    before = time.process_time()
    trainer = work.trainer(Layout(**llm), Layout(**vision))
    compiled = time.process_time() - before
    run = Timed(trainer, work.step())
    run()
    cpu, wall = [], []
    for _ in range(flags.repeats):
        start = time.process_time(), time.perf_counter()
        run()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    found = {"cpu": min(cpu), "wall": min(wall), "compile": compiled, "load": os.getloadavg()[0]}
    print(found)
    if flags.json:
        flags.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
