"""What splitting backwards in two costs: CPU time of a step under zero-bubble beside 1F1B, in turns, on equal stages.

    python benchmarks/split.py [--repeats 5]

Emulated devices share the machine's cores, so no wait shows: the ratio is that of the work. Memory is that of the
device with most. Exit status 1 if the loss behind the steps differs.
"""

import argparse
import sys

from synthetic import Timed, Workload, emulate, measured

from hetjax.core import memory
from hetjax.core.layout import Layout
from hetjax.core.remat import Remat
from models.decoder import Decoder

KEEPS = (Remat.NONE, Remat.DOTS, Remat.FULL)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    emulate(2)
    runs = {(remat, schedule): timed(remat, schedule) for remat in KEEPS for schedule in ("1f1b", "zerobubble")}
    times = measured({str(name): run for name, run in runs.items()}, repeats=repeats)
    same = True
    for remat in KEEPS:
        names = (remat, "1f1b"), (remat, "zerobubble")
        plain, split = (times[str(name)].cpu for name in names)
        most = [max(device.total for device in memory.estimate(runs[name].trainer).values()) >> 20 for name in names]
        losses = [loss(runs[name]) for name in names]
        same &= abs(losses[1] - losses[0]) <= 1e-5 * abs(losses[0])
        print(
            f"remat {remat.value}: CPU {plain:.2f} s, split {split:.2f} s, ratio {split / plain:.3f}; memory {most[0]} "
            f"and {most[1]} MiB; loss {losses[0]:.6f} and {losses[1]:.6f}",
            flush=True,
        )
    return 0 if same else 1


def timed(remat: Remat, schedule: str) -> Timed:
    """Two stages of a decoder."""
    sizes = dict(vocab_size=4096, width=512, num_layers=6, num_heads=8, num_kv_heads=4, mlp_width=1536)
    work = Workload(
        llm=Decoder(**sizes), vision=None, samples=4, seq_len=256, pictures=0, num_microbatches=4, remat=remat
    )
    return Timed(work.trainer(Layout(pp=2), schedule=schedule), work.step())


def loss(run: Timed) -> float:
    """Of the next step's first microbatch."""
    return float(run.trainer.gradients(run.state, run.microbatches).scores[0][run.trainer.graph.sink.name]["loss"])


if __name__ == "__main__":
    sys.exit(main())
