"""The watchdog ends a run in which nothing happens for longer than its limit, in a native call too, and no other."""

import itertools
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import runs
from runs import ROOT, environment, settings

from hetjax.launch import free_ports
from hetjax.run import cluster, watchdog
from hetjax.run.watchdog import TICK, Watch


def test_what_happens_starts_the_clock_anew_and_each_limit_is_that_of_its_setting() -> None:
    watch, progress = Watch(step_limit=10.5 * TICK, start_limit=20.5 * TICK), types.SimpleNamespace(count=0)
    start = time.monotonic()
    ticks = (start + n * TICK for n in itertools.count(1))
    looks = lambda count: [watch.goes_on(next(ticks)) for _ in range(count)]
    assert looks(22) == [True] * 20 + [False] * 2
    watch.steps("step 1")
    assert looks(12) == [True] * 11 + [False]  # the first of them sees the beginning
    watch.steps("step 2")
    watch.follow(progress)  # type: ignore[arg-type]
    for _ in range(5):
        progress.count += 1
        assert looks(8) == [True] * 8
    assert looks(4) == [True] * 3 + [False]


def test_seconds_in_which_the_process_itself_was_stopped_do_not_count() -> None:
    watch = Watch(step_limit=10 * TICK, start_limit=10 * TICK)
    start = time.monotonic()
    assert all(watch.goes_on(start + seconds) for seconds in (1, 10**3, 10**6))


def test_a_run_that_hangs_in_a_native_call_says_where_and_ends(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hetjax.train"]
    line += runs.arguments(runs.write(tmp_path), tmp_path / "run", settings(start_limit=2.0))
    nobody = f"127.0.0.1:{free_ports(1)}"  # for which it would wait
    told = {cluster.COORDINATOR: nobody, cluster.PROCESSES: "2", cluster.PROCESS: "1", cluster.DEVICES: "2"}
    ran = subprocess.run(line, env=environment() | told, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == watchdog.STATUS, ran
    assert "error: process 1: nothing has happened for Experiment.start_limit=2 s, in its start" in ran.stderr
    assert "in join" in ran.stderr  # where the main thread is


ALONE = """
import os, sys
from hetjax.run import cluster, several
from hetjax.run.watchdog import Watch
watch = Watch(2.0, 60.0, of="--")
def command():
    watch.steps("the first answer")
    if not cluster.is_primary():
        os.kill(os.getpid(), int(sys.argv[1]))
    cluster.meet("answers")
    return 0
sys.exit(several.together(command, watch))
"""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_command_whose_peer_hangs_or_is_dead_ends(number: int) -> None:
    told = {cluster.COORDINATOR: f"127.0.0.1:{free_ports(3)}", cluster.PROCESSES: "2", cluster.DEVICES: "1"}
    line = [sys.executable, "-c", ALONE, str(int(number))]
    how = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    running = [
        subprocess.Popen(line, env=environment() | told | {cluster.PROCESS: str(n), "PYTHONPATH": str(ROOT)}, **how)
        for n in range(2)
    ]
    try:
        said = running[0].communicate(timeout=60)[1]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert running[0].returncode == watchdog.STATUS, said
    assert "error: process 0: nothing has happened for --step_limit=2 s, in the first answer" in said
