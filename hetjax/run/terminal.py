"""What a person sees of a run: a bar and values while it goes on, and at its end what was reached and where it lies."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hetjax.run.samples import Sample

HELD_OUT = "eval/"
COLUMNS = {"loss": 8, "accuracy": 10, "token_accuracy": 8}  # of the summary, and how wide they are
CALLED = {"token_accuracy": "tokens"}
FILES = {
    "metrics.jsonl": "all numbers",
    "samples.jsonl": "answers to held-out questions",
    "curves.png": "loss, norms, speed and held-out scores over the steps",
    "tensorboard": "event files",
    "wandb": "what WANDB_MODE=offline keeps for `wandb sync`",
    "operative_config.gin": "all settings",
    "schedule.json": "what the schedule promises",
    "timelines": "recorded steps",
    "profiles": "profiled steps",
}


class Terminal:
    """A bar with the newest values below it and a lasting line for each evaluation; elsewhere (files, CI, notebooks) a
    line per write."""

    def __init__(self, num_steps: int, step: int, stream: TextIO) -> None:
        self.num_steps, self.stream = num_steps, stream
        self.console = Console(file=stream)
        self.live: Live | None = None
        if stream.isatty() and not self.console.is_dumb_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn(compact=True))
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task("", total=num_steps, completed=step)
            self.live = Live(self.progress, console=self.console)
            self.live.start(refresh=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        words = [f"{name} {_short(value)}" for name, value in values.items()]
        if self.live is None or any(name.startswith(HELD_OUT) for name in values):
            self._print(step, words)
        if self.live is not None and not any(name.startswith(HELD_OUT) for name in values):
            self.progress.update(self.task, completed=step)
            self.live.update(Group(self.progress, self._text(words)))

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            texts = {"asked": sample.question, "answered": sample.answer, "expected": sample.expected}
            self._print(step, [f"{name} {' '.join(text.split())!r}" for name, text in texts.items()])

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _print(self, step: int, words: Sequence[str]) -> None:
        if self.live is None:
            print("  ".join([f"step {step}/{self.num_steps}", *words]), file=self.stream, flush=True)
        else:
            self.console.print(self._text([f"step {step}/{self.num_steps}", *words]))

    def _text(self, words: Sequence[str]) -> Text:
        """The words in lines that the terminal is wide enough for, each word in one where it fits."""
        lines = [""]
        for word in words:
            longer = f"{lines[-1]}  {word}" if lines[-1] else word
            if lines[-1] and len(longer) > self.console.width:
                lines.append(f"  {word}")
            else:
                lines[-1] = longer
        return Text("\n".join(lines), overflow="fold")


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def summary(
    workdir: Path, records: Sequence[Mapping[str, Any]], *, num_steps: int, kept: Sequence[int], seconds: float
) -> str:
    """The last lines of a run: its numbers, rounded, from `records` of its metrics; the time; what lies in `workdir`.

    `kept` are the steps of its checkpoints."""
    trained = [record for record in records if "loss" in record]
    held_out = [record for record in records if f"{HELD_OUT}loss" in record]
    lines = [f"reached step {max(kept, default=0)} of {num_steps}; this call took {_duration(seconds)}"]
    if trained:
        lines.append(f"training loss {_rounded(trained[-1]['loss'])} at step {trained[-1]['step']}")
    if held_out:
        lines += _table(held_out[-1])
    lines.append(f"in {workdir}:")
    lines.append(f"  checkpoints (step {', '.join(map(str, sorted(kept)))})")
    lines += [f"  {name} ({what})" for name, what in FILES.items() if (workdir / name).exists()]
    return "\n".join(lines)


def _table(record: Mapping[str, Any]) -> Iterator[str]:
    """An evaluation, in 40 columns: a line with the inputs as they are, one for each blanking, one for text alone."""
    yield f"held out at step {record['step']}:"
    yield f"{'':<14}" + "".join(f"{CALLED.get(name, name):>{width}}" for name, width in COLUMNS.items())
    whats = dict.fromkeys(name.removeprefix(f"{HELD_OUT}accuracy") for name in record if "/accuracy" in name)
    for what in whats:
        cells = (record.get(f"{HELD_OUT}{name}{what}", "") for name in COLUMNS)
        row = (f"{_rounded(cell):>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
        yield (f"  {what.strip('_').replace('_', ' ') or 'as they are':<12}" + "".join(row)).rstrip()


def _rounded(value: Any) -> str:
    if value is None:
        return "nan"
    return value if isinstance(value, str) else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
