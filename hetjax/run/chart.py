"""A step, simulated or recorded, in text or as a drawing: a row for each group of devices, a box for each task."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from hetjax.core.progress import told
from hetjax.core.simulation import Span
from hetjax.core.tasks import COMPUTING, OF_MICROBATCHES, Kind, StageKey, Task
from hetjax.run.drawing import Box, Drawing, Words

FILL = {Kind.FORWARD: "-", Kind.BACKWARD: "=", Kind.WEIGHTS: "+"}
SHADE = {Kind.FORWARD: 0.0, Kind.BACKWARD: 0.3, Kind.WEIGHTS: 0.5}  # how much darker than its module's colour
COLOURS = ("#4c8cb8", "#d98c3f", "#6aa84f", "#a46ab0", "#b85c5c")  # of modules, forward; a backward's are darker
ENDS, END = COMPUTING.difference(OF_MICROBATCHES), "#909090"  # what follows them, and its colour
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


def draw(pictures: Mapping[str, Step]) -> Drawing:
    """Steps one below the other, by their titles; below them what the colours are."""
    modules = list(dict.fromkeys(module for step in pictures.values() for module, _ in step.devices))
    colours = {module: COLOURS[number % len(COLOURS)] for number, module in enumerate(modules)}
    boxes: list[Box] = []
    words: list[Words] = []
    above = 0
    for title, step in pictures.items():
        words.append(Words(4, above + 18, title))
        above += TOP
        for row in rows(step):
            words.append(Words(4, above + 17, row.name))
            boxes += _boxes(step, row, above, colours)
            above += HEIGHT
    halves = any(task.kind is Kind.WEIGHTS for step in pictures.values() for task in step.spans)
    split = ", darkest: weights' gradients" if halves else ""
    said = {f"{module}; darker: backward{split}": colour for module, colour in colours.items()}
    if any(task.kind in ENDS for step in pictures.values() for task in step.spans):
        said["the step's end"] = END
    for number, (what, colour) in enumerate(said.items()):
        x = LEFT + (340 if halves else 180) * number
        boxes.append(Box(x, above + 8, 12, 12, colour, told=what))
        words.append(Words(x + 18, above + 18, what))
    return Drawing(LEFT + WIDTH + 10, above + HEIGHT + 4, boxes, words)


def _boxes(step: Step, row: Row, y: int, colours: Mapping[str, str]) -> Iterator[Box]:
    scale = WIDTH / step.makespan
    for task, span in row.spans.items():
        colour = END if task.kind in ENDS else _darker(colours[task.stage[0]], SHADE[task.kind])
        label = "" if task.kind in ENDS else f"{task.microbatch}{_turn(row, task)}"
        x, wide = LEFT + span.begin * scale, (span.end - span.begin) * scale
        yield Box(x, y, wide, HEIGHT - 4, colour, label, told(task))


def _darker(colour: str, share: float) -> str:
    return "#" + "".join(f"{round(int(colour[n : n + 2], 16) * (1 - share)):02x}" for n in (1, 3, 5))


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
