"""What a person sees of a run: no number is cut off on a terminal of any width, and the end says what was reached."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hetjax.run.terminal import summary

ROOT = Path(__file__).parent.parent
NAMES = ["loss", "learning_rate", "gradient_norm/vision", "mfu/llm"]
VALUES = {name: number + 0.125 for number, name in enumerate(NAMES)}
EVALUATED = {
    f"eval/{name}{what}": number / 16
    for number, (name, what) in enumerate(
        (name, what) for what in ("", "_blank", "_blank_vision") for name in ("loss", "accuracy", "token_accuracy")
    )
} | {"eval/accuracy_prior": 0.6666}
ANSWER = "a " + "very " * 30 + "long :smile: [red]answer[/red]"
CODE = f"""
import pathlib, sys
from hetjax.run.metrics import open_writers
from hetjax.run.samples import Sample
with open_writers(sys.argv[1], num_steps=12000) as writers:
    writers.write(6000, {VALUES})
    writers.write(6000, {EVALUATED})
    writers.show(6000, [Sample("1", "what?", {ANSWER!r}, "no", ())])
    writers.write(12000, {VALUES})
"""


def screen(code: str, *arguments: str, columns: int, **changes: str) -> str:
    """What a process writes to a terminal that is so wide, without its control sequences."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "TERM", "FORCE_COLOR", "NO_COLOR")}
    paths = plain | dict(PYTHONPATH=str(ROOT), TERM="xterm") | changes
    line = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(line, stdin=there, stdout=there, stderr=there, env=paths) as process:
        os.close(there)
        shown = b""
        try:
            while block := os.read(here, 65536):
                shown += block
        except OSError:  # the other end is closed
            pass
    os.close(here)
    assert process.returncode == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n")


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_a_terminal_shows_every_value_whole_in_lines_that_fit(columns: int, tmp_path: Path) -> None:
    shown = screen(CODE, str(tmp_path), columns=columns)
    lines = [line.rstrip() for line in shown.split("\n")]
    assert max(map(len, lines)) <= columns and "…" not in shown
    words = re.split(r"\s+", " ".join(lines))
    for name, value in (VALUES | EVALUATED).items():
        assert any(f"{name} {value:.4g}" in line for line in lines), name
    assert "12000/12000" in words
    assert ANSWER.split() == words[words.index("answered") + 1 :][: len(ANSWER.split())] or ANSWER in " ".join(words)


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}])
def test_terminals_that_can_less_show_all_values_too(changes: dict[str, str], tmp_path: Path) -> None:
    shown = screen(CODE, str(tmp_path), columns=40, **changes)
    joined = shown.replace("\n", " ")
    assert all(re.search(rf"{re.escape(name)} +{value:.4g}", joined) for name, value in (VALUES | EVALUATED).items())


def test_a_file_gets_plain_lines_whatever_colours_are_forced(tmp_path: Path) -> None:
    paths = os.environ | dict(PYTHONPATH=str(ROOT), FORCE_COLOR="1", COLUMNS="20")
    line = [sys.executable, "-c", CODE, str(tmp_path)]
    ran = subprocess.run(line, env=paths, capture_output=True, text=True, check=True)
    assert "\x1b" not in ran.stdout and len(ran.stdout.splitlines()) == 4
    assert ran.stdout.splitlines()[0].startswith("step 6000/12000  loss 0.125  learning_rate 1.125  ")


def test_the_end_says_what_was_reached_how_long_it_took_and_where_it_lies(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "operative_config.gin"):
        (tmp_path / name).write_text("")
    records = [{"step": 300, "loss": 0.41234}, {"step": 300} | EVALUATED | {"eval/loss": None}]
    text = summary(tmp_path, records, num_steps=1200, kept=[300, 200], seconds=432.4)
    assert text.splitlines() == [
        "reached step 300 of 1200; this call took 7 min 12 s",
        "training loss 0.412 at step 300",
        "held out at step 300:",
        "                  loss  accuracy  tokens",
        "  as they are      nan     0.062   0.125",
        "  blank          0.188     0.250   0.312",
        "  blank vision   0.375     0.438   0.500",
        "  prior                    0.667",
        f"in {tmp_path}:",
        "  checkpoints (step 200, 300)",
        "  metrics.jsonl (all numbers)",
        "  samples.jsonl (answers to held-out questions)",
        "  operative_config.gin (all settings)",
    ]
    assert all(len(line) <= 40 for line in text.splitlines()[1:8])


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2 s"), (59.96, "1 min 0 s"), (3600 * 25 + 61, "25 h 1 min")])
def test_times_are_told_as_people_say_them(seconds: float, text: str, tmp_path: Path) -> None:
    assert f"took {text}" in summary(tmp_path, [], num_steps=1, kept=[1], seconds=seconds)
