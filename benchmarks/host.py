"""The host thread's CPU time per task, and the boundary's share of the host's time and of the step.

    python benchmarks/host.py [--repeats 10]

All of the thread's CPU time in a step (`time.thread_time`, of the cheapest one) is divided by the number of tasks in
its order, boundaries and the step's end among them, and by that of its forwards and backwards alone. Waiting for a
core, which is most of the wall time on a busy machine, is not in it. Nor is packing, which the data thread does. On a
busy machine the figure still grows, twofold and more, because the caches are others'.

The boundary's share of the step is measured by running a step's transfers alone, one after the other.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from synthetic import Timed, Workload, emulate, median_seconds

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat
from hetjax.core.tasks import Kind
from hetjax.core.trainer import Trainer
from models.decoder import Decoder
from models.vit import ViT

LAYOUTS = {
    "colocated": (Layout(dp=2, tp=4), Layout(dp=8)),
    "colocated, pp 2": (Layout(dp=2, tp=2, pp=2), Layout(dp=8)),
    "disjoint, dp 4 to 2": (Layout(dp=2, tp=2, devices="0-3"), Layout(dp=4, devices="4-7")),
    "disjoint, dp 3 to 2": (Layout(dp=2, tp=2, devices="0-3"), Layout(dp=3, devices="4-6")),
    "disjoint, pp 4": (Layout(pp=4, devices="0-3"), Layout(dp=4, devices="4-7")),
}


def main() -> None:
    """Prints one line per pair of layouts and setting of remat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    emulate(8)
    heads = "tasks  CPU ms each  F, B  ms each  of it boundary  alone, of step  residuals"
    print(f"layouts              remat  step s  {heads}")
    for name, (llm, vision) in LAYOUTS.items():
        for remat in (Remat.NONE, Remat.FULL):
            work = workload(remat)
            trainer = work.trainer(llm, vision)
            timed = Timed(trainer, [trainer.prepare(microbatch) for microbatch in work.step()])
            step = median_seconds({name: timed}, repeats=repeats)[name]
            cpu = min(thread_seconds(timed) for _ in range(repeats))
            host = trainer.gradients(timed.state, timed.microbatches).host
            order = trainer.pipeline.schedule.order
            computing = sum(task.kind in (Kind.FORWARD, Kind.BACKWARD) for task in order)
            alone = boundary_seconds(trainer, work.num_microbatches, repeats)
            kept = ", ".join(str(len(stage.kept)) for stage in trainer.pipeline.stages.values())
            print(
                f"{name:<20} {remat.value:<5}  {step:6.3f}  {len(order):5d}  {1e3 * cpu / len(order):11.2f}  "
                f"{computing:4d}  {1e3 * cpu / computing:7.2f}  {host.boundary_seconds / host.dispatch_seconds:14.0%}  "
                f"{alone / step:14.1%}  {kept}",
                flush=True,
            )


def workload(remat: Remat) -> Workload:
    """What the host does depends on the number of layers' arrays alone, so the model is small."""
    return Workload(
        llm=Decoder(vocab_size=256, width=64, num_layers=4, num_heads=8, num_kv_heads=4, mlp_width=192),
        vision=ViT(image_size=32, patch_size=8, width=64, num_layers=2, num_heads=8, mlp_width=128, output_width=64),
        samples=6,
        seq_len=128,
        pictures=24,
        num_microbatches=4,
        remat=remat,
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
