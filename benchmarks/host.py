"""The host thread's CPU time per task, and the boundary's share of the host's time and of the step.

    python benchmarks/host.py [--repeats 5]

A step is over some tasks and an end; all of the thread's CPU time in it (`time.thread_time`, of the cheapest step) is
divided by the number of tasks: waiting for a core, which is most of the wall time on a busy machine, is not in it.

The boundary's share of the step is measured by running a step's transfers alone, one after the other.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from synthetic import Timed, Workload, emulate, median_seconds

from hetjax.core.layout import Layout
from hetjax.core.trainer import Trainer
from models.decoder import Decoder
from models.vit import ViT

LAYOUTS = {
    "colocated, pp 1": (Layout(dp=4, tp=2), Layout(dp=8)),
    "colocated, pp 2": (Layout(dp=2, tp=2, pp=2), Layout(dp=8)),
    "disjoint, dp 4 to 2": (Layout(dp=2, tp=2, devices="0-3"), Layout(dp=4, devices="4-7")),
    "disjoint, dp 3 to 2": (Layout(dp=2, tp=2, devices="0-3"), Layout(dp=3, devices="4-6")),
    "disjoint, pp 4": (Layout(pp=4, devices="0-3"), Layout(dp=4, devices="4-7")),
}


def main() -> None:
    """Prints one line per pair of layouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    emulate(8)
    work = Workload(
        llm=Decoder(vocab_size=512, width=256, num_layers=4, num_heads=8, num_kv_heads=4, mlp_width=768),
        vision=ViT(image_size=64, patch_size=8, width=128, num_layers=2, num_heads=8, mlp_width=512, output_width=256),
        samples=6,
        seq_len=256,
        pictures=24,
        num_microbatches=4,
    )
    print("layouts              step s  tasks  CPU ms/task  of it boundary  boundary alone, of step  wire MB/step")
    for name, (llm, vision) in LAYOUTS.items():
        if llm.dp == 4:
            llm, vision = Layout(dp=2, tp=4), vision
        trainer = work.trainer(llm, vision)
        timed = Timed(trainer, work.step())
        step = median_seconds({name: timed}, repeats=repeats)[name]
        cpu = min(thread_seconds(timed) for _ in range(repeats))
        host = trainer.gradients(timed.state, work.step()).host
        alone = boundary_seconds(trainer, work.num_microbatches, repeats)
        wire = sum(b.wire_bytes for b in trainer.pipeline.boundaries.values()) * 2 * work.num_microbatches
        print(
            f"{name:<20} {step:6.3f}  {host.tasks:5d}  {1e3 * cpu / host.tasks:11.2f}  "
            f"{host.boundary_seconds / host.dispatch_seconds:14.0%}  {alone / step:23.1%}  {wire / 1e6:12.2f}",
            flush=True,
        )


def thread_seconds(run: Timed) -> float:
    """CPU seconds of this thread in one step."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def boundary_seconds(trainer: Trainer, num_microbatches: int, repeats: int) -> float:
    """Median seconds of all transfers of a step, forward and back, with nothing else running."""
    zeros = lambda arrays: {k: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding) for k, a in arrays.items()}
    boundaries = trainer.pipeline.boundaries.values()
    moves = [(b, zeros(b.source), zeros({k: b.destination[k] for k in b.gradients})) for b in boundaries]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(num_microbatches):
            for boundary, x, g in moves:
                jax.block_until_ready((boundary.forward(x), boundary.backward(g)))
        seconds.append(time.perf_counter() - start)
    return float(jnp.median(jnp.array(seconds[1:])))


if __name__ == "__main__":
    main()
