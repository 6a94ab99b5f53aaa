"""The numbers of runs as curves over their steps: loss, gradient norms, speed and held-out scores in one picture.

Each run leaves its own, however it ends; `hetjax curves` lays several over each other.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "curves.png"
SIZE, DOTS = (12, 8), 100  # inches, and dots per inch
FEW = 40  # points that are marked one by one
WIDEST = 6.0  # of a line, in points
LINES = ("-", "--", ":", "-.")
Record = Mapping[str, Any]


class Panel(NamedTuple):
    """A part of the picture. `names`: of its numbers; `compared`: those of them that are drawn of several runs."""

    title: str
    names: re.Pattern[str]
    compared: tuple[str, ...]
    scale: str = "linear"


PANELS = (
    Panel("loss", re.compile(r"loss|eval/loss|auxiliary_loss"), ("loss", "eval/loss")),
    Panel("gradient norm", re.compile(r"gradient_norm(/.*)?"), ("gradient_norm",), "log"),
    Panel("tokens per second", re.compile(r"tokens_per_second"), ("tokens_per_second",)),
    Panel("held out", re.compile(r"eval/(token_)?accuracy(_.*)?"), ("eval/accuracy", "eval/token_accuracy")),
)


class Curve(NamedTuple):
    """Numbers over steps; one that was not finite is NaN. `run`, `name`: which of its picture's, counted from 0."""

    label: str
    run: int
    name: int
    steps: list[int]
    values: list[float]


def draw(path: Path, runs: Mapping[str, Sequence[Record]]) -> None:
    """Writes the curves of `runs` (name -> records of its metrics) to a .png or .svg file, and it whole.

    Raises ValueError if there are none."""
    from matplotlib.figure import Figure  # slow to import

    panels = {panel: curves for panel in PANELS if (curves := list(_curves(panel, runs)))}
    if not panels:
        raise ValueError(f"{', '.join(runs)}: there are no numbers yet that could be drawn")
    figure = Figure(SIZE, dpi=DOTS)
    figure.suptitle(_plain(", ".join(runs)))
    figure.subplots_adjust(0.06, 0.07, 0.98, 0.91, hspace=0.24, wspace=0.14)
    for number, (panel, curves) in enumerate(panels.items(), 1):
        _fill(figure.add_subplot(-(-len(panels) // 2), min(len(panels), 2), number), panel, curves, len(runs))
    new = path.with_name(f"{path.name}.new")
    figure.savefig(new, format=path.suffix[1:])
    os.replace(new, path)


def _curves(panel: Panel, runs: Mapping[str, Sequence[Record]]) -> Iterator[Curve]:
    for number, (run, records) in enumerate(runs.items()):
        found = dict.fromkeys(name for record in records for name in record if panel.names.fullmatch(name))
        several = len(runs) > 1
        for place, name in enumerate(panel.compared if several else found):
            points = [(record["step"], record[name]) for record in records if name in record]
            steps, values = [step for step, _ in points], [math.nan if v is None else v for _, v in points]
            label = f"{name}, {run}" if several else name
            if points:
                yield Curve(label, number, place, steps, values)


def _fill(axes: "Axes", panel: Panel, curves: Sequence[Curve], num_runs: int) -> None:
    for curve in curves:
        colour = f"C{(curve.run if num_runs > 1 else curve.name) % 10}"
        mark = "." if len(curve.steps) < FEW else ""
        line = LINES[curve.name % len(LINES)] if num_runs > 1 else "-"
        width = 1.2 + 1.5 * (num_runs - 1 - curve.run)  # the first is the widest: seen beside what is drawn over it
        look: dict[str, Any] = dict(
            marker=mark, color=colour, label=_plain(curve.label), linewidth=min(width, WIDEST), alpha=0.8
        )
        axes.plot(curve.steps, curve.values, line, **look)
        broken = [step for step, value in zip(curve.steps, curve.values, strict=True) if math.isnan(value)]
        if broken:  # at the top, so that a gap does not pass for a straight line
            label = _plain(f"{curve.label}: not finite")
            axes.plot(
                broken, [0.98] * len(broken), "x", color=colour, transform=axes.get_xaxis_transform(), label=label
            )
    if any(value > 0 for curve in curves for value in curve.values):
        axes.set_yscale(panel.scale)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)


def _plain(text: str) -> str:
    """As it is: $ would begin a formula."""
    return text.replace("$", r"\$")
