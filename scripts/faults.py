"""Breaks small runs of several processes at random moments, and checks what is left of them.

    python scripts/faults.py --out DIR [--times 5] [--processes 2 4] [--only NAME ...] [--page docs/cluster.md]

Every fault: the run ends within the stated time, no complete checkpoint is lost, and the same command, started again,
gives the losses of an undisturbed run, bit for bit. DIR keeps a line of each trial that is over: the same command,
started again, goes on behind them. Prints a table, which `--page` puts in place of that page's, and what broke. Exit
status 1 if something did. A full disk needs root, to mount a small one.
"""

import argparse
import contextlib
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import outcomes
from cases import CASES, START, Ended, Settings, settings
from outcomes import Outcome
from trials import Run


@contextlib.contextmanager
def disk(workdir: Path, *, small: bool) -> Iterator[None]:
    """An empty directory in place of what an interrupted trial left; `small`: on a disk of its own, of 16 MiB."""
    if workdir.is_mount():
        unmount(workdir)
    clear(workdir)
    workdir.mkdir()
    if not small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(workdir)], check=True)
    try:
        yield
    finally:
        unmount(workdir)


def clear(workdir: Path) -> None:
    """Removes a trial's workdir and logs."""
    for left in (*workdir.parent.glob(workdir.name), *workdir.parent.glob(f"{workdir.name}.*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def unmount(directory: Path) -> None:
    subprocess.run(["umount", "-l", str(directory)], check=True)


def trial(name: str, workdir: Path, has: Settings) -> Ended:
    """One disturbed run, and its resume. Raises AssertionError with what is wrong."""
    with disk(workdir, small=name == "full disk"):
        run = Run(workdir, settings(), has.cache, has.processes)
        try:
            ended = CASES[name].fault(run, has)
            assert None not in ended.codes, f"hangs after {ended.allowed:.0f} s"
            assert set(ended.codes) <= set(CASES[name].codes), f"statuses {ended.codes}: {run.said[-1500:]}"
            before = run.checkpoints()
            run.launch()
            run.until(lambda: run.step() > max(before, default=0) or run.running[0].poll() is not None, START)
            codes = run.ended(START)
            assert codes == [0], f"the resume ends with {codes}: {run.said[-1500:]}"
            assert not before or f"at step {before[-1]}" in run.said, f"step {before[-1]} is lost"
            assert run.losses() == has.reference, "other losses"
        finally:
            run.kill()
    return ended


def undisturbed(folder: Path, processes: int) -> Settings:
    """A whole run, or what is left of it in `folder`."""
    told, run = folder / "start.json", Run(folder / "undisturbed", settings(), folder / "cache", processes)
    if not told.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        run.workdir.mkdir(parents=True)
        begun = time.monotonic()
        try:
            run.launch(learns=True)
            run.until(lambda: run.step() > 0, START)
            seconds = time.monotonic() - begun
            assert run.ended(START) == [0], run.said
        finally:
            run.kill()
        told.write_text(json.dumps(seconds))
    return Settings(folder, processes, run.losses(), run.cache, json.loads(told.read_text()), random.Random())


def tried(name: str, number: int, seed: int, has: Settings) -> Outcome:
    """A trial, whatever comes of it; its workdir and what it said stay if that is wrong."""
    workdir = has.folder / f"{name.replace(' ', '-').replace(',', '')}-{number}"
    begun = time.monotonic()
    minutes = lambda: (time.monotonic() - begun) / 60
    try:
        ended = trial(name, workdir, has._replace(draw=random.Random(f"{seed} {name} {number}")))
    except Exception as error:
        traceback.print_exc()
        return Outcome(name, has.processes, number, seed, minutes=minutes(), wrong=f"{error}"[:300])
    clear(workdir)
    codes = tuple(sorted({code for code in ended.codes if code is not None}))
    return Outcome(name, has.processes, number, seed, ended.seconds, codes, minutes())


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, metavar="N", help="trials of each fault")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], metavar="N", help="of the runs")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and the victims")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where trials leave what they found")
    parser.add_argument("--page", type=Path, metavar="FILE", help="whose table is replaced by the one found")
    flags = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder, names = flags.out.absolute(), flags.only or list(CASES)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "trials.jsonl"
    wanted = itertools.product(range(flags.times), flags.processes, names)  # each fault once before any twice
    done = {outcome.key for outcome in outcomes.read(results) if not outcome.wrong}  # the others are tried again
    todo = [trial for trial in wanted if (*trial[::-1], flags.seed) not in done]
    whole = {count: undisturbed(folder / str(count), count) for count in sorted({count for _, count, _ in todo})}
    begun = time.monotonic()
    for behind, (number, count, name) in enumerate(todo, 1):
        outcome = tried(name, number, flags.seed, whole[count])
        outcomes.add(results, outcome)
        left = (time.monotonic() - begun) / behind * (len(todo) - behind) / 60
        said = f"WRONG: {outcome.wrong}" if outcome.wrong else f"ends after {outcome.seconds:.0f} s, {outcome.codes}"
        print(f"{name}, {count} processes, {number}: {said}; {outcome.minutes:.1f} min, {left:.0f} left", flush=True)
    found = outcomes.read(results)
    print(lines := outcomes.table(found, list(CASES)))
    if flags.page:
        outcomes.put_in(flags.page, lines)
    broken = [f"{o.fault}, {o.processes} processes, {o.number}: {o.wrong}" for o in found if o.wrong]
    print("\n".join(["broken:", *broken]) if broken else "all as it should be")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
