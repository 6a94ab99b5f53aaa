"""A long run, compressed: a tiny model in several processes, with saves, evaluations, kills and resumes.

    python scripts/soak.py --out DIR [--steps 2000] [--processes 4] [--kills 5] [--seed 0]

Trains it once undisturbed and once with `--kills` processes killed at random steps and resumed. Checks that the losses
are the same, bit for bit, and that no process of the undisturbed run grows: from the second quarter of its steps to the
last by less than 2% of its memory. The same command, started again, goes on with what DIR has. Prints what it measured;
exit status 1 if a check fails.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lines
from trials import Run

DAY = 86400.0
GROWS = 0.02  # of a process's memory, at most
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20  # MiB
Samples = list[tuple[int, list[float]]]  # (step, MiB of each process)


class Notes:
    """What earlier calls of this script did and measured, a line each in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = lines.read(path)

    def add(self, **values: Any) -> None:
        """A line more."""
        self._lines.append(values)
        lines.add(self._path, values)

    def of(self, name: str) -> list[Any]:
        """The values of that name, in their order."""
        return [line[name] for line in self._lines if name in line]


@contextlib.contextmanager
def timed(notes: Notes, name: str) -> Iterator[None]:
    """Notes the minutes that it takes, also of a call that is interrupted."""
    begun = time.monotonic()
    try:
        yield
    finally:
        notes.add(**{name: (time.monotonic() - begun) / 60})


def undisturbed(run: Run, notes: Notes) -> list[int | None]:
    """The exit statuses of a run that goes on to its end; notes its memory once a second."""
    call = len(notes.of("call"))
    notes.add(call=call)
    run.launch(learns=True)
    while run.running and run.running[0].poll() is None:
        with contextlib.suppress(OSError, ValueError):  # a process that is just ending
            memory = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in run.trainers]
            if len(memory) == run.processes:
                notes.add(sample=(call, run.step(), memory))
        time.sleep(1)
    return run.ended(0)


def longest(found: Iterable[tuple[int, int, list[float]]]) -> Samples:
    """Those of the call that made most steps: processes that start anew have memory of their own."""
    calls: dict[int, Samples] = {}
    for call, step, memory in found:
        if step:
            calls.setdefault(call, []).append((step, memory))
    return max(calls.values(), key=lambda samples: samples[-1][0] - samples[0][0])


def quarters(samples: Samples) -> list[list[float]]:
    """MiB in each quarter of the steps, medians, of each process."""
    first, last = samples[0][0], samples[-1][0]
    found: list[list[list[float]]] = [[], [], [], []]
    for step, memory in samples:
        found[min(3, 4 * (step - first) // max(last - first, 1))].append(memory)
    medians = ([statistics.median(of_one) for of_one in zip(*quarter, strict=True)] for quarter in found)
    return [list(of_one) for of_one in zip(*medians, strict=True)]


def is_flat(memory: list[float]) -> bool:
    """Whether a process grows from the second of these quarters to the last by less than GROWS."""
    return memory[3] < (1 + GROWS) * memory[1]


def disturbed(run: Run, steps: list[int], notes: Notes, seed: int) -> list[int | None]:
    """Kills a process at each of these steps, and goes on to the end: its exit statuses."""
    for step in steps:
        if step in notes.of("killed"):
            continue
        run.launch()
        run.until(lambda step=step: run.step() >= step and len(run.trainers) == run.processes, DAY)  # type: ignore[misc]
        os.kill(random.Random(f"{seed} {step}").choice(run.trainers), signal.SIGKILL)
        assert run.ended(120) == [128 + signal.SIGKILL], run.said[-2000:]
        notes.add(killed=step)
    run.launch()
    return run.ended(DAY)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of the run")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="of the run: 2 or 4")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="of processes, at random steps")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the kills")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where logs and workdirs stay")
    flags = parser.parse_args()
    if flags.steps < 100:
        parser.error(f"--steps={flags.steps} are too few to look at their memory, once a second; give at least 100")
    if flags.kills >= flags.steps:
        parser.error(f"--kills={flags.kills} at different steps of --steps={flags.steps} are too many; give fewer")
    values = dict(steps=flags.steps, save_every=max(1, flags.steps // 20), eval_every=max(1, flags.steps // 10))
    settings = {f"experiment.Experiment.{name}": value for name, value in values.items()}
    folder = flags.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    notes, asked = Notes(folder / "notes.jsonl"), {k: v for k, v in vars(flags).items() if k != "out"}
    if (before := notes.of("asked")) and before[0] != asked:
        parser.error(f"{folder} has a soak of other flags, {before[0]}; give those, or another --out")
    if not before:
        notes.add(asked=asked)
    runs = [Run(folder / name, settings, folder / "cache", flags.processes) for name in ("whole", "broken")]
    kills = sorted(random.Random(flags.seed).sample(range(1, flags.steps), flags.kills))
    with contextlib.ExitStack() as stack:
        for run in runs:
            run.workdir.mkdir(parents=True, exist_ok=True)
            stack.callback(run.kill)
        if len(runs[0].losses()) < flags.steps:
            with timed(notes, "whole"):
                assert undisturbed(runs[0], notes) == [0], runs[0].said[-2000:]
        minutes = sum(notes.of("whole"))
        print(f"undisturbed: {flags.steps} steps of {flags.processes} processes in {minutes:.1f} min", flush=True)
        found = quarters(longest(notes.of("sample")))
        for number, memory in enumerate(found):
            print(f"process {number}: {', '.join(f'{m:.1f}' for m in memory)} MiB in the quarters of the steps")
        with timed(notes, "broken"):
            codes = disturbed(runs[1], kills, notes, flags.seed)
        print(f"killed at steps {kills}: ends with {codes} after {sum(notes.of('broken')):.1f} min")
    same = runs[0].losses() == runs[1].losses() and len(runs[0].losses()) == flags.steps
    print("the losses are the same, bit for bit" if same else "the losses are OTHERS")
    flat = all(map(is_flat, found))
    print("memory is flat" if flat else "memory GROWS")
    return int(codes != [0] or not same or not flat)


if __name__ == "__main__":
    sys.exit(main())
