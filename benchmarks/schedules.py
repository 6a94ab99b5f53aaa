"""Does the real loop keep to the plan? Steps of stages that sleep, beside their simulation.

    python benchmarks/schedules.py [--repeats 3] [--micros 10000] [--only WORD ...]

Each stage stands on one emulated device and its layers sleep natively (`sleeping.py`), so that stages of different
devices work side by side on a machine of few cores. The order is that of the sleeps' costs. Measured is the least wall
time of a step between two moments without work; simulated the makespan of its forwards and backwards. Exit status 1
below a rank correlation of 0.95, above a median error of 10%, or if an encoder beside a language model of the same cost
is not 1.8 times as fast over 32 microbatches as the two on one device.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats
from sleeping import BACKWARD, Sleeping, build
from synthetic import Workload, emulate

from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.tasks import Cost, StageKey
from hetjax.core.trainer import State, Trainer
from models.decoder import Decoder
from models.vit import ViT

LEAST_RANK, MOST_ERROR, LEAST_GAIN = 0.95, 0.10, 1.8
ENCODER_FROZEN, LLM_FROZEN = ("vision/*",), ("llm/*",)


class Case(NamedTuple):
    """A schedule. `layers`: of the language model and the encoder."""

    llm: Layout
    vision: Layout
    schedule: str = "1f1b"
    window: int | None = None
    frozen: tuple[str, ...] = ()
    layers: tuple[int, int] = (8, 2)
    microbatches: int = 8


TWO, FOUR = Layout(pp=2, devices="0-1"), Layout(pp=4, devices="0-3")
CASES = {
    "1f1b, pp 4, encoder beside": Case(FOUR, Layout(devices="4")),
    "gpipe, pp 4, encoder beside": Case(FOUR, Layout(devices="4"), "gpipe", microbatches=6),
    "1f1b, pp 2, encoder beside": Case(TWO, Layout(devices="2")),
    "gpipe, pp 2, encoder beside": Case(TWO, Layout(devices="2"), "gpipe", microbatches=7),
    "1f1b, pp 4, encoder pp 2": Case(FOUR, Layout(pp=2, devices="4-5"), microbatches=10),
    "interleaved, pp 4 x 2": Case(Layout(pp=4, vpp=2, devices="0-3"), Layout(devices="4"), microbatches=12),
    "interleaved, pp 2 x 2": Case(Layout(pp=2, vpp=2, devices="0-1"), Layout(devices="2")),
    "interleaved, pp 2 x 4": Case(Layout(pp=2, vpp=4, devices="0-1"), Layout(devices="2"), microbatches=6),
    "phases, encoder on the first": Case(TWO, Layout(devices="0")),
    "windows of 2, encoder on the first": Case(TWO, Layout(devices="0"), window=2),
    "windows of 4, gpipe, encoder on the first": Case(TWO, Layout(devices="0"), "gpipe", window=4),
    "phases, pp 4, encoder on the last": Case(FOUR, Layout(devices="3")),
    "windows of 4, pp 4, encoder on the third": Case(FOUR, Layout(devices="2"), window=4),
    "frozen encoder beside, pp 4": Case(FOUR, Layout(devices="4"), frozen=ENCODER_FROZEN),
    "frozen llm, pp 4": Case(FOUR, Layout(devices="4"), frozen=LLM_FROZEN, microbatches=9),
    "one device for both": Case(Layout(devices="0"), Layout(devices="0")),
    "an encoder of half a stage": Case(FOUR, Layout(devices="4"), layers=(8, 1)),
}
EQUAL = dict(layers=(4, 4), microbatches=32)
SERIAL, BESIDE = (Case(Layout(devices="0"), Layout(devices=where), **EQUAL) for where in ("0", "1"))


def main(argv: Sequence[str]) -> int:
    """Prints a line per schedule, and the exit status."""
    flags, chosen, slept = started(argv, __doc__, CASES, repeats=3, micros=10_000)
    print(f"load {os.getloadavg()[0]:.1f}\n{'schedule':<42} simulated s  measured s   error", flush=True)
    found = []
    for name, case in chosen.items():
        simulated, measured = compared(case, flags.micros, flags.repeats)
        found.append((simulated, measured))
        print(f"{name:<42} {simulated:11.3f} {measured:11.3f} {measured / simulated - 1:+7.1%}", flush=True)
    rank = stats.spearmanr(*zip(*found, strict=True)).statistic
    error = float(np.median([abs(measured / simulated - 1) for simulated, measured in found]))
    slept.value //= 4  # of four times as many microbatches
    serial, beside = (compared(case, slept.value, flags.repeats)[1] for case in (SERIAL, BESIDE))
    print(f"{len(found)} schedules: rank correlation {rank:.3f}, median error {error:.1%}")
    print(f"encoder and language model of one cost: {serial:.3f} s on one device, {beside:.3f} s beside each other,")
    print(f"{serial / beside:.2f} times as fast; load {os.getloadavg()[0]:.1f}")
    return int(not (rank >= LEAST_RANK and error <= MOST_ERROR and serial / beside >= LEAST_GAIN))


def started(
    argv: Sequence[str], about: str | None, cases: Mapping[str, Case], *, repeats: int, micros: int
) -> tuple[argparse.Namespace, dict[str, Case], Any]:
    """What the command line asks for, with these defaults; those of the cases; how long layers sleep from now on, on
    emulated devices."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--micros", type=int, default=micros, help="of a layer's forward; more on a busy machine")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name has one of these")
    flags = parser.parse_args(argv)
    chosen = {name: case for name, case in cases.items() if not flags.only or any(w in name for w in flags.only)}
    if not chosen:
        parser.error(f"no case has one of {flags.only} in its name; there are: {', '.join(cases)}")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"  # compiles sooner
    emulate(6)
    slept = build()
    slept.value = flags.micros
    return flags, chosen, slept


def compared(case: Case, micros: int, repeats: int) -> tuple[float, float]:
    """Seconds of a step, simulated and measured."""
    trainer, microbatches, _ = built(case, micros)
    state, measured = trainer.init(), []
    for _ in range(repeats + 1):
        state, seconds = seconds_of(trainer, state, microbatches)
        measured.append(seconds)
    return trainer.pipeline.schedule.forecast.makespan / 1e6, min(measured[1:])


def seconds_of(trainer: Trainer, state: State, microbatches: list) -> tuple[State, float]:
    """The state behind a step, and the wall time from one moment without work to another."""
    jax.block_until_ready(state.weights)
    start = time.perf_counter()
    state, _ = trainer.step(state, microbatches)
    jax.block_until_ready(state.weights)
    return state, time.perf_counter() - start


def built(case: Case, micros: int) -> tuple[Trainer, list, dict[StageKey, Cost]]:
    """A compiled trainer whose tasks are ordered by their sleeps, the microbatches of a step, and the sleeps."""
    layers, of_encoder = case.layers
    llm = Decoder(vocab_size=64, width=32, num_layers=layers, num_heads=2, num_kv_heads=2, mlp_width=64)
    sizes = dict(image_size=16, patch_size=8, width=32, num_heads=2, mlp_width=64, output_width=32)
    work = Workload(
        llm=Sleeping(llm),
        vision=Sleeping(ViT(num_layers=of_encoder, **sizes)),
        samples=1,
        seq_len=16,
        pictures=1,
        num_microbatches=case.microbatches,
        optimizer=OptimizerConfig(name="sgd", frozen=case.frozen),
    )
    trainer = work.trainer(case.llm, case.vision, schedule=case.schedule, encoder_window=case.window)
    slept = {key: micros * (stage.plan.hi - stage.plan.lo) for key, stage in trainer.pipeline.stages.items()}
    costs = {key: Cost(n, BACKWARD * n) for key, n in slept.items()}
    trainer.pipeline.reschedule(costs)
    return trainer, [trainer.prepare(microbatch) for microbatch in work.step()], costs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
