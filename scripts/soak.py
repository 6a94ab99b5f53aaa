"""A long run, compressed: a tiny model in several processes, with saves, evaluations, kills and resumes.

    python scripts/soak.py [--steps 2000] [--processes 4] [--kills 5] [--seed 0] [--out DIR]

Trains it once undisturbed and once with `--kills` processes killed at random steps and resumed. Checks that the losses
are the same, bit for bit, and that no process of the undisturbed run grows: from the second quarter of its steps to the
last by less than 2% of its memory. Prints what it measured; exit status 1 if a check fails.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from trials import Run

DAY = 86400.0
GROWS = 0.02  # of a process's memory, at most
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20  # MiB
Samples = list[tuple[int, list[float]]]  # (step, MiB of each process)


def watched(run: Run) -> tuple[list[int | None], Samples]:
    """The exit statuses of a run that goes on to its end, and its memory once a second."""
    samples: Samples = []
    while run.running and run.running[0].poll() is None:
        with contextlib.suppress(OSError, ValueError):  # a process that is just ending
            memory = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in run.trainers]
            if len(memory) == run.processes:
                samples.append((run.step(), memory))
        time.sleep(1)
    return run.ended(0), samples


def growth(samples: Samples, steps: int) -> list[tuple[float, float]]:
    """(MiB in the second quarter of the steps, MiB in the last) of each process, medians."""
    second = [memory for step, memory in samples if steps / 4 <= step < steps / 2]
    last = [memory for step, memory in samples if step >= 3 * steps / 4]
    return [
        (statistics.median(a), statistics.median(b))
        for a, b in zip(zip(*second, strict=True), zip(*last, strict=True), strict=True)
    ]


def disturbed(run: Run, steps: list[int], draw: random.Random) -> list[int | None]:
    """Kills a process at each of these steps, and goes on to the end: its exit statuses."""
    for step in steps:
        run.launch()
        run.until(lambda step=step: run.step() >= step, DAY)  # type: ignore[misc]
        os.kill(draw.choice(run.trainers), signal.SIGKILL)
        assert run.ended(120) == [128 + signal.SIGKILL], run.said[-2000:]
    run.launch()
    return run.ended(DAY)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of the run")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="of the run: 2 or 4")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="of processes, at random steps")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the kills")
    parser.add_argument("--out", metavar="DIR", help="where logs and workdirs stay; else they are removed")
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    values = dict(steps=flags.steps, save_every=max(1, flags.steps // 20), eval_every=max(1, flags.steps // 10))
    settings = {f"experiment.Experiment.{name}": value for name, value in values.items()}
    with contextlib.ExitStack() as stack:
        folder = Path(flags.out or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        runs = [Run(folder / name, settings, folder / "cache", flags.processes) for name in ("whole", "broken")]
        for run in runs:
            run.workdir.mkdir(parents=True)
            stack.callback(run.kill)
        begun = time.monotonic()
        runs[0].launch(learns=True)
        codes, samples = watched(runs[0])
        assert codes == [0], runs[0].said[-2000:]
        print(f"undisturbed: {flags.steps} steps of {flags.processes} processes in {time.monotonic() - begun:.0f} s")
        found = growth(samples, flags.steps)
        for number, (before, after) in enumerate(found):
            print(f"process {number}: {before:.1f} MiB in the second quarter, {after:.1f} MiB in the last")
        kills = sorted(draw.sample(range(1, flags.steps), flags.kills))
        begun = time.monotonic()
        codes = disturbed(runs[1], kills, draw)
        print(f"killed at steps {kills}: ends with {codes} after {time.monotonic() - begun:.0f} s")
        same = runs[0].losses() == runs[1].losses() and len(runs[0].losses()) == flags.steps
        print("the losses are the same, bit for bit" if same else "the losses are OTHERS")
    flat = all(after < (1 + GROWS) * before for before, after in found)
    print("memory is flat" if flat else "memory GROWS")
    return int(codes != [0] or not same or not flat)


if __name__ == "__main__":
    sys.exit(main())
