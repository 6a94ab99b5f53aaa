"""What recording costs a step (`Experiment.timeline_steps`): wall and CPU time, recorded and plain steps in turn.

    python benchmarks/recorded.py [--repeats 40]

Both kinds of step begin and end with idle devices. CPU time is that of all threads of the process; on a busy machine it
is the figure. Beside it stands what the threads that watch add by the number of tasks that they see.
"""

import argparse
import time
from collections.abc import Iterator

import jax
import numpy as np
from schedules import Case, built
from sleeping import build
from synthetic import Workload, emulate

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat
from hetjax.core.trainer import Trainer
from models.decoder import Decoder
from models.vit import ViT

MICROS = 10_000  # that a layer's forward sleeps
LAYOUTS = {
    "disjoint, pp 4": (Layout(pp=4, devices="0-3"), Layout(devices="4")),
    "colocated, pp 2": (Layout(pp=2, devices="0-1"), Layout(dp=2, devices="0-1")),
}


def main() -> None:
    """Prints a line per pair of layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    repeats = parser.parse_args().repeats
    emulate(5)
    print("layouts          seen  plain s  recorded s  wall +%   CPU +% (quartiles of the pairs)  ms per step")
    for name, trainer, microbatches in made():
        steps = [step for _ in range(repeats + 1) for step in (trainer.step, trainer.recorded)]
        state, found = trainer.init(), []
        for step in steps:
            jax.block_until_ready(state.weights)
            start, worked = time.perf_counter(), time.process_time()
            state, *rest = step(state, microbatches)
            jax.block_until_ready(state.weights)
            found.append((time.perf_counter() - start, time.process_time() - worked))
        timeline = rest[-1]
        (plain, cpu), (recorded, recorded_cpu) = (np.array(found[first::2])[1:].T for first in (0, 1))
        more = recorded_cpu - cpu
        low, middle, high = np.percentile(more / np.median(cpu), (25, 50, 75))
        print(
            f"{name:<16} {len(timeline.spans) + len(timeline.crossings):4d}  {np.median(plain):7.3f}"
            f"  {np.median(recorded):10.3f}  {np.median(recorded - plain) / np.median(plain):+7.1%}"
            f"  {middle:+7.1%} ({low:+.1%}, {high:+.1%})  {1e3 * np.median(more):19.2f}",
            flush=True,
        )


def made() -> Iterator[tuple[str, Trainer, list]]:
    """(name, trainer, microbatches of a step): stages that sleep, whose wall time is no matter of the cores; and stages
    that compute."""
    build().value = MICROS
    yield "asleep, pp 4", *built(Case(*LAYOUTS["disjoint, pp 4"]), MICROS)[:2]
    for name, layouts in LAYOUTS.items():
        trainer = workload().trainer(*layouts)
        yield name, trainer, [trainer.prepare(microbatch) for microbatch in workload().step()]


def workload() -> Workload:
    """Of so many tasks that recording shows, and large enough that a step is no mere handing out."""
    return Workload(
        llm=Decoder(vocab_size=512, width=256, num_layers=8, num_heads=8, num_kv_heads=4, mlp_width=768),
        vision=ViT(image_size=32, patch_size=8, width=128, num_layers=4, num_heads=8, mlp_width=256, output_width=256),
        samples=2,
        seq_len=128,
        pictures=4,
        num_microbatches=8,
        remat=Remat.FULL,
    )


if __name__ == "__main__":
    main()
