"""The same workloads on two checkouts of hetjax in turn: CPU time and wall time of a step, and their ratios.

    python benchmarks/compare.py OLD_CHECKOUT [--cases one colocated disjoint ...] [--rounds 3] [--json FILE]

Each round runs every case in a fresh process of the old and of the new checkout, alternating, and keeps each side's
least CPU time: waiting for a core is not in it, so that it holds on a busy machine. The load average says how busy it
was. Both sides run this checkout's `steps.py`, so that the workload is the same, with the hetjax and the
`benchmarks/synthetic.py` of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = ("one", "homogeneous", "colocated", "colocated x4", "disjoint", "quickstart")


def main() -> None:
    """Prints a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="steps of a process that are timed")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    if not (flags.old / "hetjax").is_dir():
        parser.error(f"{flags.old} is no checkout of hetjax: it has no folder hetjax")
    checkouts = {"old": flags.old.resolve(), "new": HERE.parent}
    print(f"{len(os.sched_getaffinity(0))} cores, {flags.rounds} rounds of {flags.repeats} steps; milliseconds a step")
    print("case           CPU old    CPU new  ratio     wall old   wall new  ratio  compile ratio  load")
    found = []
    for case in flags.cases:
        rows: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
        for number in range(flags.rounds):
            for side in ("old", "new") if number % 2 == 0 else ("new", "old"):
                rows[side].append(step(checkouts[side], case, flags.repeats))
        best = {
            side: {k: min(row[k] for row in kept) for k in ("cpu", "wall", "compile")} for side, kept in rows.items()
        }
        old, new = best["old"], best["new"]
        print(
            f"{case:<12} {1e3 * old['cpu']:9.1f}  {1e3 * new['cpu']:9.1f}  {new['cpu'] / old['cpu']:5.2f}    "
            f"{1e3 * old['wall']:9.1f}  {1e3 * new['wall']:9.1f}  {new['wall'] / old['wall']:5.2f}  "
            f"{new['compile'] / old['compile']:13.2f}  {os.getloadavg()[0]:4.1f}",
            flush=True,
        )
        found.append({"case": case, **{f"{side}_{k}": v for side, kept in best.items() for k, v in kept.items()}})
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


def step(checkout: Path, case: str, repeats: int) -> dict[str, Any]:
    """Seconds of one case, of a process that imports hetjax from `checkout`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (checkout, checkout / "benchmarks"))))
        line = [sys.executable, "-P", str(HERE / "steps.py"), case, "--repeats", str(repeats), "--json", str(path)]
        subprocess.run(line, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())


if __name__ == "__main__":
    main()
