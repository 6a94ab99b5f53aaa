"""Whole commands on the device that is there: `verify` in float32 and bfloat16, and a resume that repeats the bits.

    python benchmarks/gpu_commands.py verify|resume [--dtype float32|bfloat16] [--packed] [--json FILE]

`resume` trains 8 steps, takes the last checkpoint away, continues from
step 4, and compares loss and gradient norm of every step bit for bit. Exit status 1 if one fails.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import made

ROOT = Path(__file__).parent.parent
IN_BF16 = [f"--gin.{module}.compute_dtype=bfloat16" for module in ("experiment.Encoder", "experiment.LanguageModel")]


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verify", "resume"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of verify")
    parser.add_argument("--packed", action="store_true", help="rows of verify hold several documents")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        into = Path(directory)
        found = resume(into) if flags.what == "resume" else verify(into, flags.dtype, flags.packed)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))
    return 0 if all(row["good"] for row in found) else 1


def verify(directory: Path, dtype: str, packed: bool) -> list[dict[str, Any]]:
    """One row."""
    gin = made.write(directory)
    status, said = call("hetjax.verify", gin, f"--dtype={dtype}", f"--gin.settings.DataConfig.pack={packed}")
    print(f"verify --dtype={dtype}, packed {packed}: exit status {status}\n{said}", flush=True)
    return [{"dtype": dtype, "packed": packed, "good": status == 0, "said": said[-3000:]}]


def resume(directory: Path) -> list[dict[str, Any]]:
    """One row per precision: what differs between the steps of a whole run and those behind a resume."""
    gin, found = made.write(directory), []
    for dtype, bindings in (("float32", []), ("bfloat16", IN_BF16)):
        workdir = directory / dtype
        statuses = [call("hetjax.train", gin, f"--workdir={workdir}", *bindings)]
        whole = losses(workdir)
        last = max(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
        shutil.rmtree(last)
        (workdir / "metrics.jsonl").unlink()
        statuses.append(call("hetjax.train", gin, f"--workdir={workdir}", *bindings))
        again = losses(workdir)
        differ = [step for step, values in again.items() if values != whole[step]]
        good = not any(status for status, _ in statuses) and sorted(again) == [5, 6, 7, 8] and not differ
        print(f"resume in {dtype}: steps {sorted(again)} again, {differ or 'none'} differ", flush=True)
        if any(status for status, _ in statuses):
            print(*(said for _, said in statuses), sep="\n")
        found.append({"dtype": dtype, "good": good, "differ": differ, "whole": whole, "again": again})
    return found


def losses(workdir: Path) -> dict[int, list[float]]:
    """Step -> loss and gradient norm."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: [r["loss"], r["gradient_norm"]] for r in records if "gradient_norm" in r}


def call(module: str, gin: Path, *flags: str) -> tuple[int, str]:
    """Exit status and output of a command."""
    line = [sys.executable, "-m", module, f"--gin_file={gin}", *flags]
    ran = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ran.returncode, ran.stdout


if __name__ == "__main__":
    sys.exit(main())
