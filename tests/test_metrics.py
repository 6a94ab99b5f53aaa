"""What a run leaves behind: one line per write, none twice after a resume, bars only for people."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hetjax.run.metrics import FILE, SAMPLES, Writer, open_writers, read_jsonl
from hetjax.run.samples import Sample


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def run(directory: Path, steps: range, **options: Any) -> str:
    """Writes each step's loss, and what the terminal showed."""
    stream = options.pop("stream", None) or io.StringIO()
    with open_writers(directory, num_steps=100, stream=stream, **options) as writers:
        for step in steps:
            writers.write(step, {"loss": step / 4})
    return stream.getvalue()


def steps(directory: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(directory / FILE)]


def test_each_write_is_one_json_object_with_its_step(tmp_path: Path) -> None:
    run(tmp_path / "made" / "here", range(1, 4))
    lines = (tmp_path / "made" / "here" / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "loss": n / 4} for n in (1, 2, 3)]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with open_writers(tmp_path, num_steps=2, stream=io.StringIO()) as writers:
        for step in (1, 2):
            writers.write(step, {"loss": 1.0})
            assert steps(tmp_path)[-1] == step


def test_scalars_of_any_kind_become_numbers_and_what_is_not_finite_null(tmp_path: Path) -> None:
    values = {"a": jnp.float32(1.5), "b": np.float64(2.5), "c": jnp.int32(3), "d": 4, "e": math.nan, "f": -math.inf}
    with open_writers(tmp_path, num_steps=1, stream=io.StringIO()) as writers:
        writers.write(1, values)
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == dict(step=1, a=1.5, b=2.5, c=3.0, d=4, e=None, f=None)


def test_a_resumed_run_leaves_the_file_of_one_that_was_not_killed(tmp_path: Path) -> None:
    run(tmp_path / "whole", range(1, 10))
    run(tmp_path / "killed", range(1, 8))
    run(tmp_path / "killed", range(5, 10), resumed_step=4)
    assert (tmp_path / "killed" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    assert steps(tmp_path) == [1, 2, 3]
    run(tmp_path, range(5, 6), resumed_step=4)
    assert steps(tmp_path) == [1, 2, 3, 5]


def test_a_new_run_in_an_old_directory_starts_the_file_anew(tmp_path: Path) -> None:
    run(tmp_path, range(8))
    run(tmp_path, range(2))
    assert steps(tmp_path) == [0, 1]


def test_a_resume_that_dies_while_it_drops_lines_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, range(1, 8))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, range(5, 6), resumed_step=4)
    assert steps(tmp_path) == list(range(1, 8))


def test_without_a_terminal_every_write_is_a_plain_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_writers(tmp_path, num_steps=2000, stream=stream) as writers:
        writers.write(10, {"loss": 2.3456789, "tokens": 123456, "rate": 2e-05})
    assert stream.getvalue() == "step 10/2000  loss 2.346  tokens 123,456  rate 2e-05\n"


def test_on_a_terminal_a_bar_shows_the_step_and_the_values(tmp_path: Path) -> None:
    stream = Screen()
    with open_writers(tmp_path, num_steps=100, resumed_step=40, stream=stream) as writers:
        writers.write(50, {"loss": 2.5})
    shown = stream.getvalue()
    assert "40/100" in shown and "50/100" in shown and "loss 2.5" in shown and "\x1b[" in shown


def test_samples_are_shown_everywhere_and_dropped_where_a_run_resumes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    picture = np.zeros((4, 4, 3), np.uint8)
    samples = [Sample("7", "what\nis it?", "a square", "a circle", (picture,)), Sample("8", "and?", "so", "no", ())]
    stream = io.StringIO()
    with open_writers(tmp_path, num_steps=9, tensorboard=True, stream=stream) as writers:
        for step in (3, 6):
            writers.show(step, samples)
    line = "step 3/9  asked 'what is it?'  answered 'a square'  expected 'a circle'"
    assert stream.getvalue().splitlines()[0] == line
    texts = [{"id": s.id, "question": s.question, "answer": s.answer, "expected": s.expected} for s in samples]
    written = [{"step": step} | text for step in (3, 6) for text in texts]
    assert read_jsonl(tmp_path / SAMPLES) == written
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"\x89PNG") == 2 and content.count(b"a square") == 2 and b"a circle" in content
    with open_writers(tmp_path, num_steps=9, resumed_step=4, stream=stream):
        assert read_jsonl(tmp_path / SAMPLES) == written[:2]


def test_lines_of_a_process_that_is_killed_are_on_disk(tmp_path: Path) -> None:
    code = f"""
import os
from hetjax.run.metrics import open_writers
with open_writers({str(tmp_path)!r}, num_steps=2) as writers:
    writers.write(1, {{"loss": 1.0}})
    os._exit(9)
"""
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).returncode == 9
    assert steps(tmp_path) == [1]


def test_any_object_with_the_two_methods_is_a_writer(tmp_path: Path) -> None:
    with open_writers(tmp_path, num_steps=1, stream=io.StringIO()) as writers:
        writer: Writer = writers
        writer.write(1, {})
    assert steps(tmp_path) == [1]
