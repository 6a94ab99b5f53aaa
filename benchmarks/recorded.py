"""What recording costs a step (`Experiment.timeline_steps`): wall and CPU time, recorded and plain steps in turn.

    python benchmarks/recorded.py [--pairs 40] [--most 400] [--only WORD ...]

Both kinds of step begin and end with idle devices. CPU time is that of all threads of the process; on a busy machine it
is the figure: the median over pairs of steps, with two standard errors. Pairs are added until these are below 1%, or
there are the most. Beside it stands what the threads that watch add by the number of tasks that they see.
"""

import argparse
import functools
import time

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
    parser.add_argument("--pairs", type=int, default=40, help="at least")
    parser.add_argument("--most", type=int, default=400)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="stages whose name has one of these")
    flags = parser.parse_args()
    emulate(5)
    print("stages           seen  pairs  plain s  recorded s  wall +%    CPU s  CPU +%         ms per step")
    for name, make in MADE.items():
        if flags.only and not any(word in name for word in flags.only):
            continue
        seen, times = measured(*make(), flags.pairs, flags.most)
        (wall, cpu), (recorded, _) = np.median(times, axis=0)
        more_wall, more = np.median(times[:, 1] - times[:, 0], axis=0)
        print(
            f"{name:<16} {seen:4d}  {len(times):5d}  {wall:7.3f}  {recorded:10.3f}  {more_wall / wall:+7.1%}"
            f"  {cpu:7.3f}  {more / cpu:+.2%} +-{noise(times):.2%}  {1e3 * more:10.2f}",
            flush=True,
        )


def measured(trainer: Trainer, microbatches: list, least: int, most: int) -> tuple[int, np.ndarray]:
    """Tasks seen; and seconds [pairs, plain and recorded, wall and CPU]."""
    state, found = trainer.init(), []
    while True:
        pair = []
        for step in (trainer.step, trainer.recorded):
            jax.block_until_ready(state.weights)
            start, worked = time.perf_counter(), time.process_time()
            state, *rest = step(state, microbatches)
            jax.block_until_ready(state.weights)
            pair.append((time.perf_counter() - start, time.process_time() - worked))
        found.append(pair)
        times = np.array(found)[1:]  # the first pair warms up
        if len(times) >= most or (len(times) >= least and noise(times) < 0.01):
            return len(rest[-1].spans) + len(rest[-1].crossings), times


def noise(times: np.ndarray) -> float:
    """Two standard errors of the median share of CPU time that recording adds."""
    low, high = np.percentile((times[:, 1] - times[:, 0])[:, 1], (25, 75)) / np.median(times[:, 0, 1])
    return 2 * 1.253 * float(high - low) / 1.349 / len(times) ** 0.5


def asleep() -> tuple[Trainer, list]:
    """Stages that sleep, whose wall time is no matter of the cores."""
    build().value = MICROS
    return built(Case(*LAYOUTS["disjoint, pp 4"]), MICROS)[:2]


def computing(name: str) -> tuple[Trainer, list]:
    """Stages that compute."""
    trainer = workload().trainer(*LAYOUTS[name])
    return trainer, [trainer.prepare(microbatch) for microbatch in workload().step()]


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


MADE = {"asleep, pp 4": asleep} | {name: functools.partial(computing, name) for name in LAYOUTS}

if __name__ == "__main__":
    main()
