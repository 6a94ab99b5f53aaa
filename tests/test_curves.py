"""The curves of a run: every number in its panel, gaps that show, and runs over each other."""

import io
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hetjax import curves as command
from hetjax.run import curves, metrics

TEXT = "{http://www.w3.org/2000/svg}text"
VALUES = {"loss": 2.0, "gradient_norm": 1.0, "gradient_norm/llm": 0.5, "tokens_per_second": 9.0, "memory": 3.0}
HELD_OUT = {"eval/loss": 1.0, "eval/accuracy": 0.5, "eval/token_accuracy": 0.7, "eval/accuracy_blank": 0.1}


def write(workdir: Path, *values: dict, resumed: int | None = None) -> Path:
    with metrics.open_writers(workdir, num_steps=9, stream=io.StringIO(), resumed_step=resumed) as writers:
        for step, found in enumerate(values, 1 + (resumed or 0)):
            writers.write(step, found)
    return workdir


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[curves.Curve]:
    """What is drawn, from here on."""
    found: list[curves.Curve] = []
    plain = curves._fill
    monkeypatch.setattr(
        curves, "_fill", lambda axes, panel, lines, runs: (found.extend(lines), plain(axes, panel, lines, runs))
    )
    return found


def test_a_run_leaves_a_picture_of_its_whole_curves_however_often_it_resumed(tmp_path: Path, drawn: list) -> None:
    workdir = write(tmp_path / "run", VALUES, VALUES | {"loss": math.nan}, VALUES, HELD_OUT)
    assert Image.open(workdir / "curves.png").size == (1200, 800)
    loss, held_out, *others = drawn
    assert (
        loss[:1] == ("loss",) and loss.steps == [1, 2, 3] and loss.values[::2] == [2, 2] and math.isnan(loss.values[1])
    )
    assert held_out == ("eval/loss", 0, 1, [4], [1.0])
    names = ["gradient_norm", "gradient_norm/llm", "tokens_per_second", *list(HELD_OUT)[1:]]
    assert [curve.label for curve in others] == names
    drawn.clear()
    write(workdir, VALUES | {"loss": 5.0}, resumed=2)
    assert drawn[0].steps == [1, 2, 3] and drawn[0].values[2] == 5
    assert [curve.label for curve in drawn] == ["loss", *names[:3]], "nothing is left of the evaluation behind step 2"
    assert sorted(os.listdir(workdir)) == ["curves.png", "metrics.jsonl"]


def test_a_run_that_ends_by_an_error_leaves_its_picture_and_one_without_numbers_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, values in {"some": VALUES, "none": None}.items():
        with (
            pytest.raises(KeyboardInterrupt),
            metrics.open_writers(tmp_path / name, num_steps=9, stream=io.StringIO()) as writers,
        ):
            if values:
                writers.write(1, values)
            raise KeyboardInterrupt
    assert (tmp_path / "some" / "curves.png").exists() and not (tmp_path / "none" / "curves.png").exists()
    assert capsys.readouterr().out == ""


def test_a_picture_that_cannot_be_drawn_costs_a_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves, "draw", fail)
    write(tmp_path, VALUES)
    said = f"no {tmp_path}/curves.png: OSError: [Errno 28] No space left on device\n"
    assert capsys.readouterr().out == said and len(metrics.read_jsonl(tmp_path / metrics.FILE)) == 1


def test_what_is_not_finite_is_marked(tmp_path: Path) -> None:
    def words(*values: dict) -> list[str | None]:
        curves.draw(tmp_path / "a.svg", {"a$b$": [{"step": n} | found for n, found in enumerate(values)]})
        assert sorted(os.listdir(tmp_path)) == ["a.svg"]
        return [text.text for text in ElementTree.parse(tmp_path / "a.svg").iter(TEXT)]

    with pytest.MonkeyPatch.context() as patch:
        import matplotlib as mpl

        patch.setitem(mpl.rcParams, "svg.fonttype", "none")
        assert "loss: not finite" in words(VALUES, {"loss": None})
        found = words(VALUES, VALUES | {"loss": 1.0})
    assert "loss: not finite" not in found and {"loss", "a$b$"} <= set(found)


def test_the_command_lays_runs_over_each_other(tmp_path: Path, drawn: list, capsys: pytest.CaptureFixture) -> None:
    one, other = write(tmp_path / "one", VALUES, HELD_OUT), write(tmp_path / "other", VALUES, VALUES)
    drawn.clear()
    said: Callable[..., tuple[int, str]] = lambda *line: (
        command.main([str(word) for word in line]),
        capsys.readouterr().out,
    )
    assert said(one, other, f"--out={tmp_path}/made/both.svg") == (0, f"wrote {tmp_path}/made/both.svg\n")
    assert ElementTree.parse(tmp_path / "made" / "both.svg").getroot().tag.endswith("svg")
    labels = [(curve.label, curve.run) for curve in drawn]
    of_one = ["loss", "eval/loss", "gradient_norm", "tokens_per_second", "eval/accuracy", "eval/token_accuracy"]
    assert sorted(label for label, run in labels if run == 0) == sorted(f"{name}, {one}" for name in of_one)
    assert [label for label, run in labels if run == 1] == [
        f"{name}, {other}" for name in ("loss", "gradient_norm", "tokens_per_second")
    ]
    assert said(one, other) == (0, f"wrote {tmp_path}/curves.png\n")
    (one / "curves.png").unlink()
    assert said(one) == (0, f"wrote {one}/curves.png\n") and (one / "curves.png").exists()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, empty = write(tmp_path / "run", VALUES), write(tmp_path / "empty", {"memory": 1.0})
    refused = {
        (tmp_path,): f"{tmp_path} holds no metrics.jsonl; name the workdir of a run, as its --workdir did",
        (run, "--out=a.jpg"): "--out=a.jpg; its name must end in .png or .svg",
        (empty,): f"{empty}: there are no numbers yet that could be drawn",
    }
    for line, said in refused.items():
        capsys.readouterr()
        assert command.main([str(word) for word in line]) == 2 and capsys.readouterr().err == f"error: {said}\n"
