"""A step as a picture, simulated or recorded: a row for each group of devices, a box for each task, in text or SVG."""

import html
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from hetjax.core.simulation import Span
from hetjax.core.tasks import Kind, StageKey, Task

FILL = {Kind.FORWARD: "-", Kind.BACKWARD: "=", Kind.WEIGHTS: "+"}
SHADE = {Kind.FORWARD: 0.0, Kind.BACKWARD: 0.3, Kind.WEIGHTS: 0.5}  # how much darker than its module's colour
COLOURS = ("#4c8cb8", "#d98c3f", "#6aa84f", "#a46ab0", "#b85c5c")  # of modules, forward; a backward's are darker
WIDTH, HEIGHT, LEFT, TOP = 1200, 26, 140, 34  # pixels of the time, a row, the rows' names and the title


class Step(Protocol):
    """What is drawn. Of a stage without a device nothing is; `makespan`: what the width is for."""

    @property
    def devices(self) -> Mapping[StageKey, frozenset[int]]: ...

    @property
    def spans(self) -> Mapping[Task, Span]: ...

    @property
    def makespan(self) -> int: ...


class Row(NamedTuple):
    """Devices that work on the same stages, and their tasks."""

    devices: tuple[int, ...]
    stages: tuple[StageKey, ...]
    spans: dict[Task, Span]

    @property
    def name(self) -> str:
        """Such as "devices 0-3"."""
        ids = self.devices
        whole = len(ids) > 1 and ids == tuple(range(ids[0], ids[-1] + 1))
        return f"devices {ids[0]}-{ids[-1]}" if whole else f"device{'s' * (len(ids) > 1)} {','.join(map(str, ids))}"


def rows(step: Step) -> list[Row]:
    """By their first devices."""
    stages_of = {
        device: tuple(key for key, held in step.devices.items() if device in held)
        for device in sorted(frozenset().union(*step.devices.values()))
    }
    found = []
    for stages in dict.fromkeys(stages_of.values()):
        spans = {task: span for task, span in step.spans.items() if task.stage in stages}
        found.append(Row(tuple(device for device, held in stages_of.items() if held == stages), stages, spans))
    return found


def text(step: Step, width: int) -> str:
    """A line of about `width` characters per row: l3---- is a forward of module l and microbatch 3, L3==== its
    backward, L+3+++ what of that gives weights' gradients; l'3 one of the second stage that a module has on these
    devices."""
    names = _letters(step)
    margin = max(len(row.name) for row in rows(step))
    columns = max(width - margin - 3, 20)
    at = lambda time: round(time * columns / step.makespan)
    lines = []
    for row in rows(step):
        line = [" "] * columns
        for task, span in row.spans.items():
            room = at(span.end) - at(span.begin)
            letter = names[task.stage[0]] if task.kind is Kind.FORWARD else names[task.stage[0]].upper()
            letter += "+" * (task.kind is Kind.WEIGHTS)
            label = f"{letter}{_turn(row, task)}{task.microbatch}"
            line[at(span.begin) : at(span.end)] = label[:room].ljust(room, FILL[task.kind])
        lines.append(f"{row.name:<{margin}} |{''.join(line)}|")
    said = ", ".join(f"{letter} {module}" for module, letter in names.items())
    split = ", + weights' gradients" if any(task.kind is Kind.WEIGHTS for task in step.spans) else ""
    said += f"; small letters are forwards, capitals backwards{split}, each with its microbatch"
    return "\n".join([*lines, said])


def svg(pictures: Mapping[str, Step]) -> str:
    """Steps one below the other, by their titles, for a browser; a box tells its task."""
    modules = list(dict.fromkeys(module for step in pictures.values() for module in _letters(step)))
    heights = [TOP + HEIGHT * len(rows(step)) for step in pictures.values()]
    size = f'width="{LEFT + WIDTH + 10}" height="{sum(heights) + HEIGHT}"'
    style = "text { font: 12px sans-serif } .box text { fill: white; text-anchor: middle }"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>{style}</style>",
    ]
    for above, (title, step) in zip(itertools.accumulate(heights, initial=0), pictures.items(), strict=False):
        lines.append(f'<text x="4" y="{above + 18}">{html.escape(title)}</text>')
        for number, row in enumerate(rows(step)):
            y = above + TOP + HEIGHT * number
            lines.append(f'<text x="4" y="{y + 17}">{html.escape(row.name)}</text>')
            lines += _boxes(step, row, y, modules)
    halves = any(task.kind is Kind.WEIGHTS for step in pictures.values() for task in step.spans)
    split = ", darkest: weights&#39; gradients" if halves else ""
    for number, module in enumerate(modules):
        x, y = LEFT + (300 if halves else 150) * number, sum(heights) + 4
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>')
        lines.append(f'<text x="{x + 18}" y="{y + 11}">{html.escape(module)}; darker: backward{split}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _boxes(step: Step, row: Row, y: int, modules: list[str]) -> Iterator[str]:
    scale = WIDTH / step.makespan
    for task, span in row.spans.items():
        module, stage = task.stage
        x, wide = LEFT + span.begin * scale, (span.end - span.begin) * scale
        colour = COLOURS[modules.index(module) % len(COLOURS)]
        box = f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{HEIGHT - 4}" fill="{colour}" stroke="white"/>'
        opacity = SHADE[task.kind]
        shade = f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{HEIGHT - 4}" opacity="{opacity}"/>'
        label = f"{task.microbatch}{_turn(row, task)}"
        written = f'<text x="{x + wide / 2:.1f}" y="{y + 16}">{label}</text>' if wide > 8 * len(label) else ""
        what = f"{task.kind.name.lower()} of microbatch {task.microbatch}, {module}/{stage}"
        yield (f'<g class="box"><title>{html.escape(what)}</title>{box}{shade if opacity else ""}{written}</g>')


def _turn(row: Row, task: Task) -> str:
    """Which of the stages that a module has on these devices: a stroke for each one before."""
    return "'" * [key for key in row.stages if key[0] == task.stage[0]].index(task.stage)


def _letters(step: Step) -> dict[str, str]:
    """A small letter for each module: its first that no other has."""
    found: dict[str, str] = {}
    for module, _ in step.devices:
        free = [c for c in module.lower() + "abcdefghijklmnopqrstuvwxyz" if c.isalpha() and c not in found.values()]
        found.setdefault(module, free[0] if module not in found else "")
    return found
