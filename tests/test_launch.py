"""`hetjax launch`: several processes train, save, end on a signal, die together, and resume as fewer."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from runs import ROOT, arguments, environment, records, settings

from hetjax.launch import free_ports
from hetjax.run.checkpoint import steps_in
from hetjax.run.metrics import SAMPLES

APART = runs.layouts(vision=dict(dp=2, devices="0-1"), llm=dict(dp=2, devices="2-3")) | settings(
    emulated_devices=4, save_every=2
)


def start(gin: Path, workdir: Path, changes: runs.Changes, *, processes: int = 2) -> subprocess.Popen:
    """A launch of so many processes that have four devices together."""
    line = [sys.executable, "-m", "hetjax", "launch", "-n", str(processes), "--devices-per-process"]
    line += [str(4 // processes), "--", "train", *arguments(gin, workdir, changes)]
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


def test_two_processes_are_killed_resumed_and_stopped(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    seen = runs.held_out(gin) | settings(eval_every=4, eval_microbatches=1, eval_samples=2, eval_sample_tokens=2)
    many = APART | seen | settings(steps=1000)
    launch = start(gin, tmp_path / "run", many)
    saved(tmp_path / "run", 4, launch)
    os.kill(children(launch)[1], signal.SIGKILL)
    said = ended(launch, 30)
    assert launch.returncode == 128 + signal.SIGKILL, said
    assert "process 1 ended with status -9: all end" in said
    killed = max(steps_in(tmp_path / "run" / "checkpoints"))

    launch = start(gin, tmp_path / "run", many)
    saved(tmp_path / "run", killed + 2, launch)
    os.kill(children(launch)[1], signal.SIGTERM)  # a process that is no primary
    said = ended(launch, 60)
    assert launch.returncode == 0, said
    stopped = int(re.search(r"a signal to another process: saved step (\d+)", said)[1])
    assert stopped in steps_in(tmp_path / "run" / "checkpoints")

    runs.train(gin, tmp_path / "alone", APART | seen | settings(steps=stopped))
    for name in ("loss", "eval/loss", "eval/token_accuracy"):
        one, alone = (records(tmp_path / where, name) for where in ("run", "alone"))
        one = {step: one.get(step) for step in alone if name == "loss" or step < stopped}  # the last one: at the end
        assert one and one == {step: alone[step] for step in one}, name
    said = [(tmp_path / where / SAMPLES).read_text().splitlines() for where in ("run", "alone")]
    assert said[0] and said[0] == said[1][: len(said[0])]
    read = [records(tmp_path / "run", f"media_bytes/{n}") for n in range(2)]
    assert min(read[0].values()) > 0 and not any(read[1].values()), "the second process has no encoder"


def test_a_picture_that_one_process_cannot_read_ends_all(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    for picture in (tmp_path / "train").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:-30])
    launch = start(gin, tmp_path / "run", APART | {"settings.DataConfig.on_bad_item": "stop"})
    said = ended(launch, 60)
    assert launch.returncode == 2, said
    for process in range(2):
        assert re.search(rf"\[{process}\] error: sample .* \(.*/train/vision-\d-0.png\): .*truncated", said), said


def test_what_cannot_be_launched_is_said_before_anything_starts(capfd: pytest.CaptureFixture[str]) -> None:
    for line, says in {
        "-n 0 -- train": "-n=0; it must be at least 1",
        "-n 2": "no command; write -- train",
        "-n 2 -- verify": "verify runs in one process alone",
        "-n 2 --devices-per-process=-1 -- train": "--devices-per-process=-1; it must be at least 0",
    }.items():
        ran = subprocess.run([sys.executable, "-m", "hetjax", "launch", *line.split()], cwd=ROOT, capture_output=True)
        assert ran.returncode == 2 and says in ran.stderr.decode(), ran


def test_processes_of_other_settings_do_not_start(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    port = free_ports(3)
    told = {"HETJAX_COORDINATOR": f"127.0.0.1:{port}", "HETJAX_NUM_PROCESSES": "2", "HETJAX_DEVICES_PER_PROCESS": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "hetjax.train", *arguments(gin, tmp_path / "run", APART | settings(steps=3 + n))],
            env=environment() | told | {"HETJAX_PROCESS": str(n)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        said = running[1].communicate(timeout=120)[1]
        assert running[1].returncode == 2
        assert "process 1 has another configuration than process 0: 'experiment.Experiment.steps = 4'" in said
    finally:
        for process in running:
            process.kill()
            process.wait()
