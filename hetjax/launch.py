"""Starts several processes on this machine that train, verify or generate as one, each with its own devices.

    hetjax launch -n 4 --devices-per-process 2 -- train --gin_file=run.gin --workdir=runs/four

When one of them dies, all end. What they print is prefixed by their number; the first one prints the progress. Exit
status: 0 trained, or saved after a signal; 2 what the user can mend; 3 the watchdog's, of a run that hung; else that of
the first process that died, 128 + N if signal N killed it. `--max-restarts` starts all again unless it is 0 or 2, from
the newest complete checkpoint.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hetjax.run import cluster, signals

COMMANDS = ("train", "verify", "generate")  # that several processes run together
GPUS = Path("/proc/driver/nvidia/gpus")  # has an entry for each
GRACE = 10.0  # seconds in which the others may end, and say why, by themselves


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, or that of the first process that died."""
    parser = argparse.ArgumentParser(prog="hetjax launch", description=(__doc__ or "").strip(), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes")
    parser.add_argument(
        "--devices-per-process", type=int, default=0, metavar="N", help="CPU devices to emulate in each; 0: GPUs"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="times that all start again when one died"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and a command of hetjax")
    flags = parser.parse_args(argv)
    command = flags.command[1:] if flags.command[:1] == ["--"] else flags.command
    least = (
        ("-n", flags.n, 1),
        ("--devices-per-process", flags.devices_per_process, 0),
        ("--max-restarts", flags.max_restarts, 0),
    )
    for name, value, low in least:
        if value < low:
            parser.error(f"{name}={value}; it must be at least {low}")
    if not command:
        parser.error("no command; write -- train ... behind the flags")
    if command[0] not in COMMANDS:
        parser.error(f"{command[0]!r} is none of the commands that run in several processes: {', '.join(COMMANDS)}")
    try:
        devices = [emulated(flags.devices_per_process)] * flags.n if flags.devices_per_process else real(flags.n)
    except ValueError as error:
        parser.error(str(error))
    for restart in range(1 + flags.max_restarts):
        if restart:
            print(f"restart {restart} of {flags.max_restarts}", file=sys.stderr, flush=True)
        status, stopped = run(command, devices)
        if status in (0, 2) or stopped:  # 2: what only the user can mend
            break
    return status


def emulated(count: int) -> dict[str, str]:
    """The environment of a process that emulates so many devices."""
    return {cluster.DEVICES: str(count)}


def real(count: int) -> list[dict[str, str]]:
    """The environments of so many processes that share this machine's GPUs, each with as many, one behind another.

    Raises ValueError where there are none, or they cannot be shared evenly."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        list(map(str, range(len(list(GPUS.glob("*")))))) if visible is None else list(filter(None, visible.split(",")))
    )
    if not gpus:
        raise ValueError("--devices-per-process=0, but there is no GPU; give each process CPU devices to emulate")
    if len(gpus) % count:
        raise ValueError(
            f"-n={count} processes cannot share {len(gpus)} GPUs ({','.join(gpus)}) evenly; start as many as divide "
            "them, or name some in CUDA_VISIBLE_DEVICES"
        )
    each = len(gpus) // count
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[n * each : (n + 1) * each])} for n in range(count)]


def run(command: Sequence[str], devices: Sequence[Mapping[str, str]]) -> tuple[int, bool]:
    """(exit status, whether a signal asked for the end) of the processes of one run; `devices`: what tells each its
    own."""
    count = len(devices)
    port = free_ports(1 + count)
    told = {cluster.COORDINATOR: f"127.0.0.1:{port}", cluster.PROCESSES: str(count)}
    running = []
    for number, own in enumerate(devices):
        env = os.environ | told | {cluster.PROCESS: str(number), cluster.DEVICES: "0", **own}
        start = [sys.executable, "-m", "hetjax", *command]
        process = subprocess.Popen(
            start, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=die_with_parent
        )
        running.append(process)
    printers = [threading.Thread(target=_print, args=pair) for pair in enumerate(running)]
    for printer in printers:
        printer.start()
    with _passing_on(running) as stopped:
        status = _wait(running)
    for printer in printers:
        printer.join()
    return status, bool(stopped)


def die_with_parent() -> None:
    """In a process that was just forked: where the launcher is killed, so that it can end nobody, Linux ends this one
    (prctl, PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait(running: Sequence[subprocess.Popen]) -> int:
    """0, or the status of the first process that died, behind which all are ended."""
    while True:
        codes = [process.poll() for process in running]
        died = [(number, code) for number, code in enumerate(codes) if code]
        if died:
            number, code = died[0]
            print(f"process {number} ended with status {code}: all end", file=sys.stderr, flush=True)
            _end(running)
            return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(0.1)


def _end(running: Sequence[subprocess.Popen]) -> None:
    deadline = time.monotonic() + GRACE
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()) / 2)
    for process in running:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _passing_on(running: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C reach the first process, which tells the others; those that came are in the list."""
    came: list[int] = []

    def receive(number: int, frame: object) -> None:
        came.append(number)
        running[0].send_signal(signal.SIGTERM)

    with signals.heard(receive):
        yield came


def _print(number: int, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens at. Raises ValueError where there is none."""
    for port in range(20000 + os.getpid() % 10000, 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for n in range(count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + n))
            return port
    raise ValueError(f"no {count} ports in a row are free on this machine; end other runs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
