"""`hetjax launch`: several processes train, save, end on a signal, die together, hang and end, and resume as fewer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import ROOT, arguments, environment, records, settings

from hetjax.launch import free_ports
from hetjax.run import cluster, watchdog
from hetjax.run.checkpoint import steps_in

LIMIT = 6.0  # seconds that a step or a save may hang
APART = runs.layouts(vision=dict(dp=2, devices="0-1"), llm=dict(dp=2, devices="2-3")) | settings(
    emulated_devices=4, save_every=20, step_limit=LIMIT
)


def start(
    gin: Path, workdir: Path, changes: runs.Changes, *, processes: int = 2, restarts: int = 0
) -> subprocess.Popen:
    """A launch of so many processes that have four devices together."""
    line = [sys.executable, "-m", "hetjax", "launch", "-n", str(processes), f"--max-restarts={restarts}"]
    line += [f"--devices-per-process={4 // processes}", "--", "train", *arguments(gin, workdir, changes)]
    never = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9", PYTHONUNBUFFERED="1")
    return subprocess.Popen(
        line, env=environment() | never, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(launch: subprocess.Popen, seconds: float) -> str:
    """Its output, once it has ended; it fails if that takes longer."""
    try:
        return launch.communicate(timeout=seconds)[0]
    finally:
        launch.kill()


def saved(workdir: Path, step: int, launch: subprocess.Popen, seconds: float = 200) -> None:
    """Waits for a checkpoint of `step` or later."""
    end = time.monotonic() + seconds
    while max(steps_in(workdir / "checkpoints"), default=0) < step:
        assert launch.poll() is None and time.monotonic() < end, launch.communicate()[0]
        time.sleep(0.1)


def children(launch: subprocess.Popen) -> list[int]:
    """The processes of a launch, in their order."""
    return sorted(map(int, Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()))


def test_two_processes_are_killed_restarted_hang_resume_and_stop(tmp_path: Path) -> None:
    gin, many = runs.write(tmp_path), APART | settings(steps=10000)
    launch = start(gin, tmp_path / "run", many, restarts=1)
    saved(tmp_path / "run", 20, launch)
    first = children(launch)
    os.kill(first[1], signal.SIGKILL)
    killed = max(steps_in(tmp_path / "run" / "checkpoints"))
    saved(tmp_path / "run", killed + 20, launch)
    stopped, after = children(launch)[1], max(steps_in(tmp_path / "run" / "checkpoints"))
    assert stopped not in first
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(LIMIT / 3)
    os.kill(stopped, signal.SIGCONT)
    saved(tmp_path / "run", after + 40, launch)
    os.kill(stopped, signal.SIGSTOP)
    said = ended(launch, 3 * LIMIT + 10)
    assert launch.returncode == watchdog.STATUS, said
    assert "process 1 ended with status -9: all end" in said and "restart 1 of 1" in said
    assert f"[0] error: process 0: nothing has happened for Experiment.step_limit={LIMIT:g} s, in" in said
    assert "[0]   the host's thread is" in said and "[0]   vision/0 (process 0)" in said
    killed = max(steps_in(tmp_path / "run" / "checkpoints"))

    launch = start(gin, tmp_path / "run", many)
    saved(tmp_path / "run", killed + 20, launch)
    os.kill(children(launch)[1], signal.SIGTERM)  # a process that is no primary
    said = ended(launch, 60)
    assert launch.returncode == 0, said
    stopped = int(re.search(r"a signal to another process: saved step (\d+)", said)[1])
    assert stopped in steps_in(tmp_path / "run" / "checkpoints")

    runs.train(gin, tmp_path / "alone", APART | settings(steps=stopped))
    both = records(tmp_path / "run"), records(tmp_path / "alone")
    assert sorted(both[0]) == sorted(both[1])
    np.testing.assert_array_equal(list(both[0].values()), list(both[1].values()))


def test_what_cannot_be_launched_is_said_before_anything_starts(capfd: pytest.CaptureFixture[str]) -> None:
    for line, says in {
        "-n 0 -- train": "-n=0; it must be at least 1",
        "-n 2": "no command; write -- train",
        "-n 2 -- verify": "verify runs in one process alone",
        "-n 2 --devices-per-process=-1 -- train": "--devices-per-process=-1; it must be at least 0",
        "-n 2 --max-restarts=-1 -- train": "--max-restarts=-1; it must be at least 0",
    }.items():
        ran = subprocess.run([sys.executable, "-m", "hetjax", "launch", *line.split()], cwd=ROOT, capture_output=True)
        assert ran.returncode == 2 and says in ran.stderr.decode(), ran


@pytest.mark.parametrize(
    "differs", ["configuration than process 0: 'experiment.Experiment.steps = 4' where that has 'experiment", "data"]
)
def test_processes_of_other_settings_or_data_do_not_start(differs: str, tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    shutil.copytree(tmp_path / "train", tmp_path / "other" / "train")
    where = [tmp_path, tmp_path / "other"]
    if differs == "data":
        data = where[1] / "train" / "data.json"
        data.write_text(data.read_text().replace("q0", "q1"))
    steps = [3, 4] if differs != "data" else [3, 3]
    relative = {"train/settings.DataConfig.path": "train/data.json"}
    told = {cluster.COORDINATOR: f"127.0.0.1:{free_ports(3)}", cluster.PROCESSES: "2", cluster.DEVICES: "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "hetjax.train"]
            + arguments(gin, tmp_path / "run", APART | relative | settings(steps=steps[n])),
            env=environment() | told | {cluster.PROCESS: str(n), "PYTHONPATH": str(ROOT)},
            cwd=where[n],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        for n, process in enumerate(running):
            said = process.communicate(timeout=120)[1]
            assert process.returncode == 2, said
            assert f"error: process {n}: process 1 has another {differs}" in said
    finally:
        for process in running:
            process.kill()
            process.wait()
