"""What offload costs and frees on one accelerator: steps of a 1B decoder with residuals and optimizer state in the
host's memory or not, under GPipe, whose residuals wait longest.

    python benchmarks/offload.py [--repeats 3] [--json FILE] [--tiny]

Exit status 1 if the losses differ or, where the device tells its peak, that does not fall by half of what the memory
table says.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from mfu import workload
from synthetic import Timed, median_seconds, offloaded

from hetjax.core import memory
from hetjax.core.layout import Layout
from hetjax.core.trainer import Trainer

KINDS = (("residuals", "optimizer"), ())  # what takes least first: a device tells the most that it ever held
SAME = 1e-3  # of losses: kernels of GPUs may sum in another order each time


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    work = workload("1b", "dots", tiny=flags.tiny)
    plain, found = work.trainer(Layout(), schedule="gpipe"), []
    for kinds in KINDS:
        found.append(measure(offloaded(plain, kinds), work.step(), flags.repeats))
        print(
            "offload {offload}: {seconds:.3f} s, loss {loss:.6f}, {peak:.2f} GiB at most "
            "({told:.2f} by the table, {host:.2f} on the host)".format(**found[-1]),
            flush=True,
        )
    away, there = found
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))
    falls = there["peak"] == 0 or there["peak"] - away["peak"] > (there["told"] - away["told"]) / 2
    return 0 if falls and abs(away["loss"] - there["loss"]) <= SAME * abs(there["loss"]) else 1


def measure(trainer: Trainer, step: list, repeats: int) -> dict[str, Any]:
    """Seconds of a step, the loss of the next, and GiB."""
    run, taken = Timed(trainer, step), memory.estimate(trainer)[0]
    seconds = median_seconds({"step": run}, repeats=repeats)["step"]
    loss = float(trainer.gradients(run.state, step).scores[0][trainer.graph.sink.name]["loss"])
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "offload": " and ".join(trainer.graph.sink.layout.offload) or "nothing",
        "seconds": seconds,
        "loss": loss,
        "peak": peak / 2**30,
        "told": taken.total / 2**30,
        "host": taken.host / 2**30,
    }


if __name__ == "__main__":
    sys.exit(main())
