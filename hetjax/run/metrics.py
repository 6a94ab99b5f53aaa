"""Where the numbers of a run go: DIR/metrics.jsonl and the terminal always, viewers by setting (`boards.py`), and at
the end DIR/curves.png.

    with open_writers(workdir, num_steps=1500, resumed_step=500) as writers:
        writers.write(510, {"loss": 2.31, "tokens_per_second": 41000.0})

metrics.jsonl holds one JSON object per line, each with its "step"; it can be read while the run goes on, and a run that
was killed and resumed leaves the same file as one that was not.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from hetjax.run import boards, cluster, curves
from hetjax.run.samples import Sample
from hetjax.run.terminal import Terminal

FILE, SAMPLES = "metrics.jsonl", "samples.jsonl"
Values = Mapping[str, Any]  # numbers, or scalars of NumPy or jax


class Writer(Protocol):
    """Takes the values of a step, and samples of its answers; `close` says that no more will come."""

    def write(self, step: int, values: Values) -> None: ...

    def show(self, step: int, samples: Sequence[Sample]) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def open_writers(
    directory: str | os.PathLike[str],
    *,
    num_steps: int,
    resumed_step: int | None = None,
    tensorboard: bool = False,
    wandb: str = "",
    stream: TextIO | None = None,
) -> Iterator[Writer]:
    """One writer for all places, which in all but the first of several processes writes nothing. `stream` is the
    terminal; None is standard output. `wandb`: the project there; "" writes none.

    `resumed_step` is the step of the checkpoint that the run continues from: what was written for later steps is
    dropped. None starts anew.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        if not cluster.is_primary():
            yield _All(writers)
            return
        path, add = Path(directory), lambda writer: writers.append(stack.enter_context(contextlib.closing(writer)))
        if tensorboard:
            add(boards.TensorBoard(path, resumed_step))
        if wandb:
            add(boards.Wandb(path, wandb, resumed=resumed_step is not None))
        add(Picture(path))  # is closed behind the lines that it draws
        add(JsonLines(path, resumed_step))
        add(Terminal(num_steps, resumed_step or 0, stream or sys.stdout))
        yield _All(writers)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that a killed run left unfinished is left out.

    Raises ValueError for another line that is none."""
    *lines, rest = Path(path).read_text(errors="replace").split("\n")
    records = [_record(line) for line in lines]
    if None in records:
        raise ValueError(
            f"{path}:{records.index(None) + 1} is no record: {lines[records.index(None)][:60]!r}; remove the line, or "
            "move the file away"
        )
    return [record for record in (*records, _record(rest)) if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def last_step(directory: Path) -> int | None:
    """The last step of which there are records in `directory`. Raises ValueError for a file that holds others."""
    files = (directory / name for name in (FILE, SAMPLES))
    return max((record["step"] for path in files if path.is_file() for record in read_jsonl(path)), default=None)


def has(directory: Path, step: int | None, name: str) -> bool:
    """Whether there is a value of that name of a step."""
    path = directory / FILE
    return path.is_file() and any(r["step"] == step and name in r for r in read_jsonl(path))


class _All:
    """Hands everything to several writers."""

    def __init__(self, writers: list[Writer]) -> None:
        self.writers = writers

    def write(self, step: int, values: Values) -> None:
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        for writer in self.writers:
            writer.write(step, numbers)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for writer in self.writers:
            writer.show(step, samples)

    def close(self) -> None:
        """Nothing: `open_writers` closes them."""


class JsonLines:
    """Appends to DIR/metrics.jsonl, and samples to DIR/samples.jsonl.

    A value that is not finite is null, as JSON has no other word for it."""

    def __init__(self, directory: Path, resumed_step: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        for path in (directory / FILE, directory / SAMPLES):
            if path.exists():
                kept = [] if resumed_step is None else [r for r in read_jsonl(path) if r["step"] <= resumed_step]
                _replace(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = (directory / FILE).open("a")

    def write(self, step: int, values: Values) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _explained(self.directory / FILE):
            self.file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
            self.file.flush()

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        with _explained(self.directory / SAMPLES), (self.directory / SAMPLES).open("a") as file:
            for sample in samples:
                texts = dict(id=sample.id, question=sample.question, answer=sample.answer, expected=sample.expected)
                file.write(json.dumps({"step": step} | texts) + "\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was written out, or its error raised
            self.file.close()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make room there, and start the same command again") from error


def _replace(path: Path, text: str) -> None:
    """Makes `text` the content of `path`, or leaves it as it was if the process dies on the way."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


class Picture:
    """Draws DIR/curves.png when it is closed, from the lines of the whole run."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.written = directory, False

    def write(self, step: int, values: Values) -> None:
        self.written = True

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing: answers are no curves."""

    def close(self) -> None:
        if not self.written:
            return
        path = self.directory / curves.FILE
        try:
            curves.draw(path, {str(self.directory): read_jsonl(self.directory / FILE)})
        except Exception as error:  # the run is worth more than its picture, whatever that fails of
            print(f"no {path}: {type(error).__name__}: {error}", flush=True)
