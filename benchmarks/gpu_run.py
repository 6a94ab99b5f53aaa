"""Everything that only a GPU can show, in one command of at most 9 minutes: correctness first, then speed.

    python benchmarks/gpu_run.py --out DIR [--seconds 540] [--only PART ...] [--tiny]

Writes DIR/results.json and DIR/page.md after every part, so that what is done is kept if a later part fails or time
runs out, and DIR/log.txt. Each part is a process of its own under its own time limit; the first ones, whose times do
not matter, run at once. `--tiny` runs all of it with small sizes on whatever device is there. Exit status 1 if a part
failed.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: a script of this folder with its flags, and the seconds it may take at most.

    `steady`: under XLA's deterministic kernels, which alone give the same bits again."""

    name: str
    script: str
    flags: tuple[str, ...]
    tiny: tuple[str, ...]  # in place of `flags`
    seconds: int
    steady: bool = False


SHAPE = ("--heads", "16", "8", "128")
LENGTHS, FEW = ("--seq_len", "2048", "8192", "32768"), ("--seq_len", "64", "--blocks", "32", "--repeats", "1")
ON_GPU = (*LENGTHS, *SHAPE, "--blocks", "2048")


def mfu(case: str, remat: str, seconds: int, *options: str) -> Part:
    """A training step of `case`."""
    flags = ("--case", case, "--remat", remat, *options)
    name = " ".join(["mfu", case, remat, *(option.strip("-") for option in options)])
    return Part(name, "mfu.py", flags, (*flags, "--tiny", "--repeats", "1"), seconds)


def verify(*options: str) -> Part:
    """`hetjax verify` on a small run."""
    name = " ".join(["verify", *(option.split("=")[-1].strip("-") for option in options)])
    return Part(name, "gpu_commands.py", ("verify", *options), ("verify", *options), 200)


TOGETHER = (
    Part("kernels", "gpu_kernels.py", (), ("--tiny",), 200),
    Part("kernels, steady", "gpu_kernels.py", (), ("--tiny",), 200, steady=True),
    *(verify(f"--dtype={dtype}", *packed) for dtype in ("float32", "bfloat16") for packed in ((), ("--packed",))),
    Part("resume", "gpu_commands.py", ("resume",), ("resume",), 200, steady=True),
)
ALONE = (
    Part("grouped", "grouped.py", (), ("--tiny",), 60),
    mfu("1b", "auto", 80),
    mfu("3b", "auto", 100),
    mfu("vlm", "auto", 130),
    mfu("1b", "auto", 80, "--documents", "8"),
    Part("attention packed", "attention.py", (*ON_GPU, "--packed"), (*FEW, "--packed"), 80),
    Part("attention", "attention.py", ON_GPU, FEW, 80),
    mfu("8b_slice", "auto", 90),
    Part("transformers", "against_transformers.py", ("--large",), ("--tiny", "--repeats", "1"), 150),
    Part("offload", "offload.py", (), ("--tiny", "--repeats", "1"), 90),
    mfu("1b", "full", 90),
)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of parts")
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    known = {part.name for part in (*TOGETHER, *ALONE)}
    for name in flags.only or ():
        if name not in known:
            parser.error(f"--only {name!r}: the parts are {', '.join(sorted(known))}")
    wanted = [[p for p in parts if not flags.only or p.name in flags.only] for parts in (TOGETHER, ALONE)]
    run = Run(flags.out, time.monotonic() + flags.seconds, flags.tiny)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda part: run.part(part, share=True), wanted[0]))
    for part in wanted[1]:
        run.part(part)
    print((flags.out / "page.md").read_text())
    return 0 if all(row["status"] == 0 for row in run.results) else 1


class Run:
    """The parts that are done, in a folder."""

    def __init__(self, out: Path, end: float, tiny: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.end, self.tiny = out, end, tiny
        self.results: list[dict[str, Any]] = []
        self.lock = threading.Lock()  # of the results and their files

    def part(self, part: Part, *, share: bool = False) -> None:
        """Runs it, and writes what is known by then. `share`: the device's memory, with others."""
        left = self.end - time.monotonic()
        began = time.monotonic()
        status, said, figures = (None, "no time was left", None) if left < 5 else self.call(part, left, share)
        row = {"part": part.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
        with self.lock:
            self.results.append(row | {"said": said[-6000:], "figures": figures})
            with (self.out / "log.txt").open("a") as log:
                log.write(f"==== {part.name}: status {status}, {row['seconds']} s\n{said}\n")
            (self.out / "results.json").write_text(json.dumps(self.results, indent=1))
            (self.out / "page.md").write_text(page(self.results))
        print(f"{part.name}: status {status}, {row['seconds']} s", flush=True)

    def call(self, part: Part, left: float, share: bool) -> tuple[int | None, str, Any]:
        """(exit status, None where time ran out; output; figures) of one part."""
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])])
        if part.steady:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
        if share or part.script == "against_transformers.py":  # beside torch
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        else:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
        with tempfile.TemporaryDirectory() as directory:
            path, log = Path(directory) / "figures.json", Path(directory) / "log.txt"
            flags = part.tiny if self.tiny else part.flags
            line = [sys.executable, str(HERE / part.script), *flags, "--json", str(path)]
            with log.open("w") as output:
                process = subprocess.Popen(
                    line, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                try:
                    status: int | None = process.wait(min(part.seconds, left))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 9)  # with what it started
                    process.wait()
                    status = None
            figures = json.loads(path.read_text()) if path.is_file() else None
            return status, log.read_text(errors="replace"), figures


def page(results: list[dict[str, Any]]) -> str:
    """All parts for a reader: what each said, shortened."""
    lines = ["# GPU run", "", "| part | status | seconds |", "| --- | --- | --- |"]
    lines += [
        f"| {r['part']} | {'out of time' if r['status'] is None else r['status']} | {r['seconds']} |" for r in results
    ]
    logged = re.compile(r"[WEI]\d{4} ")  # XLA's own lines
    for r in results:
        shown = [line for line in r["said"].splitlines() if not logged.match(line)]
        lines += ["", f"## {r['part']}", "", *(f"    {line}" for line in shown[-45:])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
