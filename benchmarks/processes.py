"""What several processes cost, and gain, beside one: the host's CPU time per task, bytes per boundary, throughput.

    python benchmarks/processes.py [--part host throughput] [--repeats 5] [--json FILE]

host: eight emulated devices, of one process and of four, under the same layouts. Per process, the CPU time of its host
thread in a step over its own forwards and backwards (as in host.py), and what each boundary takes to other devices.

throughput: an encoder and a language model of about equal cost over 32 microbatches, on one core: one device, one
process; beside the two disjoint, a process and a core each. Wants two cores that nobody else uses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import host
from layouts import encoder_flops, llm_flops
from synthetic import Timed, Workload, emulate, median_seconds

from hetjax.core.layout import Layout
from hetjax.core.remat import Remat
from hetjax.core.tasks import Kind
from hetjax.launch import free_ports
from hetjax.run import cluster
from models.decoder import Decoder
from models.vit import ViT

EQUAL = Workload(
    llm=Decoder(vocab_size=512, width=256, num_layers=4, num_heads=8, num_kv_heads=4, mlp_width=768),
    vision=ViT(image_size=80, patch_size=8, width=256, num_layers=6, num_heads=8, mlp_width=768, output_width=256),
    samples=2,
    seq_len=256,
    pictures=4,
    num_microbatches=32,
)
ONE, DISJOINT = (Layout(), Layout()), (Layout(devices="1"), Layout(devices="0"))  # language model, encoder


def main() -> None:
    """Prints a table per part; as one of several processes, writes what this one finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("host", "throughput"), nargs="+", default=["host", "throughput"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-one-of", nargs=4, metavar=("PORT", "COUNT", "PROCESS", "DEVICES"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.as_one_of:
        found = as_one_of(flags.part[0], flags.repeats, *map(int, flags.as_one_of))
        flags.json.write_text(json.dumps(found))
        cluster.leave()
    else:
        print(f"load {os.getloadavg()[0]:.1f}")
        found = {part: PARTS[part](flags.repeats) for part in flags.part}
        if flags.json:
            flags.json.write_text(json.dumps(found, indent=1))


def host_table(repeats: int) -> dict[str, Any]:
    """One process of eight devices beside four of two."""
    one, four = (run("host", repeats, count, devices=8 // count) for count in (1, 4))
    print("layouts               CPU ms/task: one process   each of four   MiB per microbatch, forward")
    for name in host.LAYOUTS:
        alone, each = one[0][name], [of_one[name] for of_one in four]
        assert all(of_one["wire"] == alone["wire"] for of_one in each)
        times = "  ".join(f"{of_one['ms']:5.2f}" if of_one["ms"] is not None else "    -" for of_one in each)
        crossing = ", ".join(f"{edge} {size / 2**20:.2f}" for edge, size in alone["wire"].items())
        print(f"{name:<22} {alone['ms']:25.2f}   {times}   {crossing}")
    return {"one": one, "four": four}


def throughput_table(repeats: int) -> dict[str, Any]:
    """One core beside two."""
    encoder, llm = encoder_flops(EQUAL), llm_flops(EQUAL)
    print(f"encoder {encoder / llm:.2f} of the language model's FLOPs, {EQUAL.num_microbatches} microbatches")
    one, two = run("throughput", repeats, 1, devices=1), run("throughput", repeats, 2, devices=1)
    serial, disjoint = one[0]["step"], max(each["step"] for each in two)
    print(f"one after the other, one core: {serial:.3f} s a step; disjoint, a core each: {disjoint:.3f} s")
    print(f"throughput: {serial / disjoint:.2f} times")
    return {"one": one, "two": two}


PARTS = {"host": host_table, "throughput": throughput_table}


def run(part: str, repeats: int, count: int, *, devices: int) -> list[dict[str, Any]]:
    """What each of `count` processes finds, each on a core of its own where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, f"{process}.json") for process in range(count)]
        told = (free_ports(1 + count), count)
        running = []
        for process, file in enumerate(files):
            numbers = map(str, (*told, process, devices))
            line = [sys.executable, __file__, "--part", part, "--repeats", str(repeats), "--json", str(file)]
            pin = (lambda process=process: os.sched_setaffinity(0, {cores[process]})) if part == "throughput" else None
            running.append(subprocess.Popen([*line, "--as-one-of", *numbers], preexec_fn=pin))
        statuses = [process.wait() for process in running]
        if any(statuses):
            raise SystemExit("a process failed")
        return [json.loads(file.read_text()) for file in files]


def as_one_of(part: str, repeats: int, port: int, count: int, process: int, devices: int) -> dict[str, Any]:
    """What process number `process` of `count` finds."""
    emulate(devices)
    if count > 1:
        cluster.join(f"127.0.0.1:{port}", count, process, devices)
    if part == "host":
        return {name: of_layouts(*pair, repeats) for name, pair in host.LAYOUTS.items()}
    return {"step": step_seconds(EQUAL, *(ONE if count == 1 else DISJOINT), repeats)}


def of_layouts(llm: Layout, vision: Layout, repeats: int) -> dict[str, Any]:
    """CPU milliseconds of this process's host thread per task of its own, and each boundary's bytes."""
    workload = host.workload(Remat.NONE)
    timed = made(workload, llm, vision)
    cpu = min(host.thread_seconds(timed) for _ in range(repeats))
    pipeline = timed.trainer.pipeline
    mine = [t for t in pipeline.schedule.order if t.kind in (Kind.FORWARD, Kind.BACKWARD) and t.stage in pipeline.mine]
    wire = {name: boundary.wire_bytes for name, boundary in pipeline.boundaries.items()}
    return {"ms": 1e3 * cpu / len(mine) if mine else None, "wire": wire}


def step_seconds(workload: Workload, llm: Layout, vision: Layout, repeats: int) -> float:
    """Median wall seconds of a step."""
    timed = made(workload, llm, vision)
    return median_seconds({"": timed}, repeats=repeats)[""]


def made(workload: Workload, llm: Layout, vision: Layout) -> Timed:
    """A trainer that has taken a step, in all processes."""
    trainer = workload.trainer(llm, vision)
    cluster.meet(f"compiled {llm} {vision}")
    timed = Timed(trainer, [trainer.prepare(microbatch) for microbatch in workload.step()])
    timed()
    return timed


if __name__ == "__main__":
    main()
