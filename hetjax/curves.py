"""Draws the loss, gradient norms, speed and held-out scores of runs over their steps, in one picture.

    hetjax curves runs/quickstart
    hetjax curves runs/dp4 runs/dp2 --out=runs/compared.svg

A RUN is the workdir of a run, which may still go on. Exit status 0: drawn; 2: there is nothing to draw, and why.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hetjax.data.paths import expanded
from hetjax.run import command, curves, metrics
from hetjax.run.checks import check_ending

SUFFIXES = (".png", ".svg")


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    parser = command.new_parser("curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a run")
    parser.add_argument(
        "--out", metavar="FILE", help=f".png or .svg; without it RUN/{curves.FILE}, beside several runs"
    )
    flags = parser.parse_args(argv)
    try:
        workdirs = [Path(expanded(run)) for run in dict.fromkeys(flags.runs)]
        if flags.out:
            check_ending("--out", flags.out, SUFFIXES)
        path = Path(expanded(flags.out)) if flags.out else _beside(workdirs)
        runs = {str(workdir): _records(workdir) for workdir in workdirs}
        path.parent.mkdir(parents=True, exist_ok=True)
        curves.draw(path, runs)
        print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _beside(workdirs: Sequence[Path]) -> Path:
    return (workdirs[0] if len(workdirs) == 1 else workdirs[0].absolute().parent) / curves.FILE


def _records(workdir: Path) -> list[dict]:
    path = workdir / metrics.FILE
    if not path.is_file():
        raise ValueError(f"{workdir} holds no {metrics.FILE}; name the workdir of a run, as its --workdir did")
    return metrics.read_jsonl(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
