"""What `faults.py` does to runs, at which moments, and how those may end."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from trials import Run

LIMIT = 15.0  # seconds that a step may hang in these runs
STEPS, SAVES, EVALUATES = 40, 10, 20
HEARTBEAT = 100.0  # seconds behind which jax ends what hangs outside of steps (cluster.HEARTBEAT)
SLACK = 20.0  # seconds: hetjax launch gives the others 10 to end, and this machine is busy
START = 900.0  # seconds that a whole run may take here
# put before what one process runs: the pool of the data's threads gets a task that raises
CRASH_HOOK = """
import os
if os.environ.get("HETJAX_PROCESS") == "1":
    import concurrent.futures, itertools
    submit, count = concurrent.futures.ThreadPoolExecutor.submit, itertools.count()
    def breaks(*arguments):
        raise MemoryError("a worker's crash")
    def counted(self, function, *arguments, **named):
        of_data = getattr(function, "__module__", "").startswith("hetjax.data")
        return submit(self, breaks if of_data and next(count) == {calls} else function, *arguments, **named)
    concurrent.futures.ThreadPoolExecutor.submit = counted
"""
# ... one of its programs finds no memory when it is handed to the devices
MEMORY_HOOK = """
import os
if os.environ.get("HETJAX_PROCESS") == "1":
    import itertools, jax
    call, count = jax.stages.Compiled.__call__, itertools.count()
    def breaks(self, *arguments, **named):
        if next(count) == {calls}:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.")
        return call(self, *arguments, **named)
    jax.stages.Compiled.__call__ = breaks
"""


class Settings(NamedTuple):
    """What all trials share."""

    folder: Path
    processes: int
    reference: Mapping[int, float]
    cache: Path
    seconds: float  # of a start
    draw: random.Random


class Ended(NamedTuple):
    """How the disturbed call ended: its exit statuses, the seconds from the fault to there, the seconds allowed."""

    codes: list[int | None]
    seconds: float
    allowed: float


Fault = Callable[[Run, Settings], Ended]
IN_STEP = 1.1 * LIMIT + SLACK
ANYWHERE = 1.2 * max(HEARTBEAT, 1.2 * LIMIT) + SLACK


def in_step(run: Run, has: Settings) -> None:
    """Waits for a random moment in a random step."""
    step = has.draw.randrange(3, STEPS - 5)
    run.until(lambda: run.step() >= step, START)
    time.sleep(has.draw.random() * 0.2)


def in_start(run: Run, has: Settings) -> None:
    run.until(lambda: len(run.trainers) == has.processes, START)
    moment = time.monotonic() + has.draw.random() * has.seconds
    run.until(lambda: time.monotonic() >= moment or run.step() > 0, START)  # what is compiled already starts sooner


def in_save(run: Run, has: Settings) -> None:
    number = has.draw.randrange(1, STEPS // SAVES)
    unfinished = lambda: any((run.workdir / "checkpoints").glob(f"{number * SAVES}.*tmp*"))
    run.until(unfinished, START)
    time.sleep(has.draw.random() * 0.05)


def in_evaluation(run: Run, has: Settings) -> None:
    run.until(lambda: run.step() >= EVALUATES, START)
    time.sleep(has.draw.random() * 0.5)


MOMENTS = {"start": in_start, "step": in_step, "save": in_save, "evaluation": in_evaluation}


def killed(moment: str, victim: int | None = None, *, alone: bool = False) -> Fault:
    """SIGKILL of a process, a random one unless it is named; `alone`: of processes that nobody else would end."""
    return signalled(signal.SIGKILL, moment, victim, alone=alone)


def signalled(number: signal.Signals, moment: str, victim: int | None = None, *, alone: bool = False) -> Fault:
    def fault(run: Run, has: Settings) -> Ended:
        run.start_each() if alone else run.launch()
        MOMENTS[moment](run, has)
        chosen = has.draw.randrange(has.processes) if victim is None else victim
        pids = run.trainers
        others = [p for p in run.running if p.pid != pids[chosen]]
        os.kill(pids[chosen], number)
        begun, allowed = time.monotonic(), ANYWHERE if moment == "start" else IN_STEP
        if alone:  # the stopped one itself stays
            run.running[:] = others
        codes = run.ended(allowed)
        seconds = time.monotonic() - begun
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[chosen], signal.SIGKILL)
        return Ended(codes, seconds, allowed)

    return fault


def stopped_shortly(run: Run, has: Settings) -> Ended:
    """SIGSTOP for less than the limit: nothing may come of it."""
    run.launch()
    in_step(run, has)
    victim = run.trainers[has.draw.randrange(has.processes)]
    os.kill(victim, signal.SIGSTOP)
    time.sleep(LIMIT * has.draw.uniform(0.3, 0.8))
    os.kill(victim, signal.SIGCONT)
    begun = time.monotonic()
    return Ended(run.ended(START), time.monotonic() - begun, START)


def full_disk(run: Run, has: Settings) -> Ended:
    """The disk with the workdir fills up, before a random save."""
    run.launch()
    in_step(run, has)
    with contextlib.suppress(OSError), (run.workdir / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(2**16))
            filler.flush()
    begun = time.monotonic()
    codes = run.ended(ANYWHERE)
    (run.workdir / "filler").unlink()
    return Ended(codes, time.monotonic() - begun, ANYWHERE)


def corrupt_shard(run: Run, has: Settings) -> Ended:
    """A random file of the newest checkpoint's arrays has other bytes in its middle: it is refused, and once it is
    removed, as the message says, the run goes on from the one before."""
    run.launch()
    run.until(lambda: len(run.checkpoints()) == 2, START)
    for pid in run.trainers:
        os.kill(pid, signal.SIGKILL)
    run.ended(ANYWHERE)
    newest = run.workdir / "checkpoints" / str(run.checkpoints()[-1])
    files = sorted(path for path in (newest / "state").rglob("*") if path.is_file() and path.parent.name == "d")
    shard = has.draw.choice(files)
    content = bytearray(shard.read_bytes())
    place = has.draw.randrange(len(content))
    for n in range(place, min(place + 16, len(content))):
        content[n] ^= 0xFF
    shard.write_bytes(content)
    begun = time.monotonic()
    run.launch()
    codes = run.ended(START)
    if codes == [2] and str(newest) in run.said:
        shutil.rmtree(newest)
    return Ended(codes, time.monotonic() - begun, START)


def hooked(code: str, calls: tuple[int, int], says: str) -> Fault:
    """Code that the processes begin with, which breaks at a random one of so many calls; what the run then says."""

    def fault(run: Run, has: Settings) -> Ended:
        hook = run.workdir.with_suffix(".hook")
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(code.replace("{calls}", str(has.draw.randrange(*calls))))
        run.environment = {"PYTHONPATH": os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])}
        run.launch()
        begun = time.monotonic()
        codes = run.ended(START)
        run.environment = {}
        assert re.search(says, run.said), run.said[-2000:]
        return Ended(codes, time.monotonic() - begun, START)

    return fault


def other_settings(run: Run, has: Settings) -> Ended:
    """One process has another learning rate."""
    changes: list[dict[str, object]] = [{} for _ in range(has.processes)]
    changes[has.draw.randrange(1, has.processes)]["optimizer.OptimizerConfig.learning_rate"] = has.draw.random()
    begun = time.monotonic()
    run.start_each(changes)
    codes = run.ended(START)
    assert "has another configuration than process 0: 'optimizer" in run.said, run.said[-2000:]
    return Ended(codes, time.monotonic() - begun, START)


class Case(NamedTuple):
    """A fault and the exit statuses that it may give."""

    fault: Fault
    codes: tuple[int, ...]


DEAD = 128 + signal.SIGKILL
OUT_OF_MEMORY = r"error: process 1: ends by what follows(.|\n)*RESOURCE_EXHAUSTED(.|\n)*in the .* of (vision|llm)/0"
GONE = (1, 3, -signal.SIGABRT)  # an error of the transport, the watchdog, jax's own end of who lost the coordinator
CASES = {
    **{f"SIGKILL in {moment}": Case(killed(moment), (DEAD,)) for moment in MOMENTS},
    "SIGKILL of the coordinator": Case(killed("step", 0), (DEAD,)),
    "SIGKILL in step, no launcher": Case(killed("step", alone=True), GONE),
    "SIGSTOP beyond the limit": Case(signalled(signal.SIGSTOP, "step"), (3,)),
    "SIGSTOP beyond it, no launcher": Case(signalled(signal.SIGSTOP, "step", alone=True), GONE),
    "SIGSTOP within the limit": Case(stopped_shortly, (0,)),
    "full disk": Case(full_disk, (1, 2)),
    "corrupt shard": Case(corrupt_shard, (0, 2)),  # 0: nothing reads those bytes
    "crash of a data worker": Case(hooked(CRASH_HOOK, (200, 600), "process 1: .*a worker's crash"), (1, 2)),
    "out of memory in a process": Case(hooked(MEMORY_HOOK, (200, 600), OUT_OF_MEMORY), (1,)),
    "other settings in one process": Case(other_settings, (2,)),
}


def settings() -> dict[str, object]:
    """Those of all runs."""
    values = dict(steps=STEPS, save_every=SAVES, eval_every=EVALUATES, step_limit=LIMIT)
    return {f"experiment.Experiment.{name}": value for name, value in values.items()}
