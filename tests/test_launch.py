"""`hetjax launch`: several processes train, save, end on a signal, die together, hang and end, and resume as fewer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import answering
import corpus
import pytest
import runs
import test_mutants as mutants
from hf_folders import llava, text, vision
from runs import ROOT, arguments, environment, records, settings

from hetjax import launch as launcher
from hetjax.launch import free_ports
from hetjax.run import cluster, curves, watchdog
from hetjax.run.checkpoint import steps_in
from hetjax.run.metrics import SAMPLES

PARENT = """
import subprocess, sys, time
from hetjax.launch import die_with_parent
print(subprocess.Popen(["sleep", "60"], preexec_fn=die_with_parent).pid, flush=True)
time.sleep(60)
"""
LIMIT = 6.0  # seconds that a step or a save may hang
APART = runs.layouts(vision=dict(dp=2, devices="0-1"), llm=dict(dp=2, devices="2-3")) | settings(
    emulated_devices=4, save_every=20, step_limit=LIMIT
)


def start(gin: Path, workdir: Path, changes: runs.Changes, *, restarts: int = 0) -> subprocess.Popen:
    """A launch of two processes that train with four devices together, and keep their programs beside `workdir`."""
    kept = dict(JAX_COMPILATION_CACHE_DIR=str(workdir.parent / "programs"))
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return launched("train", *arguments(gin, workdir, changes), devices=4, restarts=restarts, env=kept)


def launched(
    *command: str, devices: int, cwd: Path = ROOT, restarts: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Two processes that run a command with so many devices together, and the code in `cwd`."""
    line = [sys.executable, "-m", "hetjax", "launch", "-n", "2", "--devices-per-process", str(devices // 2)]
    line += [f"--max-restarts={restarts}", "--"]
    never = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9", PYTHONUNBUFFERED="1", PYTHONPATH=str(cwd))
    return subprocess.Popen(
        [*line, *command],
        env=environment() | never | (env or {}),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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
    gin = runs.write(tmp_path)
    seen = runs.held_out(gin) | settings(eval_every=20, eval_microbatches=1, eval_samples=2, eval_sample_tokens=2)
    many = APART | seen | settings(steps=10000, schedule_costs="measured", timeline_steps=[3])
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
    kept = list((tmp_path / "programs").glob("jit_*_forward-*-cache"))
    assert len(kept) == 2, "each process has programs of its own, and keeps them"

    launch = start(gin, tmp_path / "run", many)
    saved(tmp_path / "run", killed + 20, launch)
    os.kill(children(launch)[1], signal.SIGTERM)  # a process that is no primary
    said = ended(launch, 60)
    assert launch.returncode == 0, said
    stopped = int(re.search(r"a signal to another process: saved step (\d+)", said)[1])
    assert stopped in steps_in(tmp_path / "run" / "checkpoints")
    assert re.search(rf"as {tmp_path}/run/costs.json has them: vision/0 [\d.]+/[\d.]+, llm/0 [\d.]+/[\d.]+ ms", said), (
        said
    )
    recorded = {f"step-3{whose}.{kind}" for whose in ("", "-process-1") for kind in ("svg", "png", "json")}
    assert set(os.listdir(tmp_path / "run" / "timelines")) == recorded
    measured = [records(tmp_path / "run", f"timeline/{name}")[3] for name in ("idle", "seconds/vision", "seconds/llm")]
    assert 0 < measured[0] < 1 and min(measured[1:]) > 0, "both processes' devices, told to the first"
    assert (tmp_path / "run" / curves.FILE).read_bytes().startswith(b"\x89PNG")

    runs.train(gin, tmp_path / "alone", APART | seen | settings(steps=stopped))
    for name in ("loss", "eval/loss", "eval/token_accuracy"):
        one, alone = (records(tmp_path / where, name) for where in ("run", "alone"))
        one = {step: one.get(step) for step in alone if name == "loss" or step < stopped}  # the last one: at the end
        assert one and one == {step: alone[step] for step in one}, name
    answers = [(tmp_path / where / SAMPLES).read_text().splitlines() for where in ("run", "alone")]
    assert answers[0] and answers[0] == answers[1][: len(answers[0])]
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
        by = rf"\[{process}\] error: process {process}: sample"
        assert re.search(rf"{by} .* \(.*/train/vision-\d-0.png\): .*truncated", said), said


@pytest.mark.slow
def test_two_processes_answer_as_one_does(tmp_path: Path) -> None:
    folder = answering.folder(tmp_path / "model", llava(text("llama"), vision("clip")))
    picture = answering.picture(tmp_path / "a.png", 0)
    line = [f"--model={folder}", f"--image={picture}", "--prompt=w3 w5", "--prompt=w4", "--max_new_tokens=6"]
    for devices, how in ((4, ["--tp=2", "--dp=2"]), (2, ["--tp=2", "--temperature=1", "--top_k=5"])):
        one = [sys.executable, "-m", "hetjax", "generate", *line, *how, f"--emulated_devices={devices}"]
        alone = subprocess.run(one, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
        said = ended(launched("generate", *line, *how, devices=devices), 200)
        assert len(alone.stdout.splitlines()) == 2
        assert [found[4:] for found in said.splitlines() if found.startswith("[0] {")] == alone.stdout.splitlines()
    said = ended(launched("generate", *line, devices=2), 60)
    assert "tp=1 x dp=1 takes devices of 1 of 2 processes; start 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "generate"])
def test_a_command_whose_second_process_is_stopped_ends(command: str, tmp_path: Path) -> None:
    limit = 30.0
    if command == "verify":
        changes = APART | settings(step_limit=limit)
        bindings = [f"--gin.{name}={value!r}" for name, value in changes.items()]
        line, name = [f"--gin_file={runs.write(tmp_path)}", "--steps=100000", *bindings], "Experiment.step_limit"
    else:
        folder = answering.folder(tmp_path / "model", text("llama"))
        line, name = [f"--model={folder}", "--tp=2", "--batch_size=1", f"--step_limit={limit}"], "--step_limit"
        line += [f"--prompt=w{3 + n % 40} w5" for n in range(5000)]
    launch = launched(command, *line, devices=4 if command == "verify" else 2)
    assert launch.stdout is not None
    while "step 1: loss" not in (said := launch.stdout.readline()) and '"question"' not in said:
        assert said, launch.wait()
    os.kill(children(launch)[1], signal.SIGSTOP)
    said = ended(launch, 3 * limit + 10)
    assert launch.returncode == watchdog.STATUS, said
    assert f"[0] error: process 0: nothing has happened for {name}={limit:g} s, in " in said
    assert "[0]   the host's thread is" in said or command == "generate"


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["", "boundary_gradient_scaled", "reduce_without_cp"])
def test_two_processes_judge_as_one_does(patch: str, tmp_path: Path) -> None:
    for package in ("hetjax", "models"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    if patch:
        mutants.apply(mutants.MUTANTS / "disjoint" / f"{patch}.patch", tmp_path)
    (tmp_path / "data").mkdir()
    data = corpus.write(tmp_path / "data", mutants.SAMPLES * 2, [mutants.ITEM])
    files = [f"--gin_file={mutants.MUTANTS / name}.gin" for name in ("tiny", "disjoint")]
    launch = launched("verify", *files, f"--gin.settings.DataConfig.path={data!r}", devices=8, cwd=tmp_path)
    said = ended(launch, 300)
    assert launch.returncode == bool(patch), said
    assert said.count("difference") == 2 and ("BEYOND" in said) == bool(patch), said


def test_what_cannot_be_launched_is_said_before_anything_starts(capfd: pytest.CaptureFixture[str]) -> None:
    for line, says in {
        "-n 0 -- train": "-n=0; it must be at least 1",
        "-n 2": "no command; write -- train",
        "-n 2 -- convert": "'convert' is none of the commands that run in several processes",
        "-n 2 --devices-per-process=-1 -- train": "--devices-per-process=-1; it must be at least 0",
        "-n 2 --max-restarts=-1 -- train": "--max-restarts=-1; it must be at least 0",
        "-n 2 -- train": "--devices-per-process=0, but there is no GPU; give each process CPU devices to emulate",
    }.items():
        start = [sys.executable, "-m", "hetjax", "launch", *line.split()]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        ran = subprocess.run(start, cwd=ROOT, env=env, capture_output=True)
        assert ran.returncode == 2 and says in ran.stderr.decode(), ran


def test_processes_share_the_machines_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7,6")
    named = [each["CUDA_VISIBLE_DEVICES"] for each in launcher.real(2)]
    assert named == ["4,5", "7,6"]
    with pytest.raises(ValueError, match=r"-n=3 processes cannot share 4 GPUs \(4,5,7,6\) evenly; start as many as"):
        launcher.real(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for bus in ("0000:1b:00.0", "0000:43:00.0"):
        (tmp_path / bus).mkdir()
    monkeypatch.setattr(launcher, "GPUS", tmp_path)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in launcher.real(2)] == ["0", "1"]


GPIPE = """
import sys
from hetjax import train
from hetjax.core import pipeline
plain = pipeline.build_schedule
pipeline.build_schedule = lambda *given, kind, **named: plain(*given, kind="gpipe", **named)
sys.exit(train.main(sys.argv[1:]))
"""
SETTINGS = "configuration than process 0: 'experiment.Experiment.steps = 4' where that has 'experiment"


MISSING = "ended: DataConfig.path='train/data.json': No such file or directory"


@pytest.mark.parametrize(
    "differs", [SETTINGS, MISSING, *(pytest.param(what, marks=pytest.mark.slow) for what in ("data", "order of tasks"))]
)
def test_processes_of_other_settings_or_data_do_not_start(differs: str, tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    shutil.copytree(tmp_path / "train", tmp_path / "other" / "train")
    where = [tmp_path, tmp_path / "other"]
    if differs == "data":
        data = where[1] / "train" / "data.json"
        data.write_text(data.read_text().replace("q0", "q1"))
    elif differs == MISSING:
        (where[1] / "train" / "data.json").unlink()
    steps = [3, 4] if differs == SETTINGS else [3, 3]
    command = [["-m", "hetjax.train"], ["-c", GPIPE] if differs == "order of tasks" else ["-m", "hetjax.train"]]
    relative = {"train/settings.DataConfig.path": "train/data.json"}
    told = {cluster.COORDINATOR: f"127.0.0.1:{free_ports(3)}", cluster.PROCESSES: "2", cluster.DEVICES: "2"}
    running = [
        subprocess.Popen(
            [sys.executable, *command[n]]
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
            if differs != MISSING:
                assert f"error: process {n}: process 1 has another {differs}" in said
            elif n == 0:
                assert f"error: process 0: process 1 {differs}" in said
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_a_signal_in_the_start_is_not_lost() -> None:
    code = """
import os, signal, time
from hetjax.run import cluster
cluster.join_as_told()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    told = {cluster.COORDINATOR: f"127.0.0.1:{free_ports(2)}", cluster.PROCESSES: "1", cluster.PROCESS: "0"}
    env = environment() | told | {cluster.DEVICES: "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=50)
    assert ran.returncode == -signal.SIGTERM, ran


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_who_is_started_dies_with_a_launcher_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        assert "sleep" in (child / "cmdline").read_text()
        parent.kill()
        deadline = time.monotonic() + 10
        while child.exists() and "State:\tZ" not in (child / "status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
