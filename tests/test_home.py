"""~ is the home directory everywhere a path goes, and nothing else in a path is replaced."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

from hetjax import convert, train
from hetjax.data import DataConfig
from hetjax.data.paths import expanded
from hetjax.generate import __main__ as answers
from hetjax.generate import ask
from hetjax.generate.prompt import read_items
from hetjax.hf.output import written
from hetjax.hf.stored import open_source
from hetjax.run import command, config, experiment
from hetjax.run.experiment import Experiment


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory, which is not where commands are typed."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_a_tilde_in_front_is_a_home_directory_and_nothing_else_is(home: Path) -> None:
    assert expanded("~") == str(home) and expanded("~/a/~b") == f"{home}/a/~b"
    assert expanded("~root/a") == os.path.expanduser("~root/a") != "~root/a"
    for same in ("a/~", "./~x", "$HOME/a", "", "/a b/~"):
        assert expanded(same) == same
    with pytest.raises(
        ValueError, match=r"'~nobody-here/a': ~nobody-here is no user's home directory; write ./~nobody"
    ):
        expanded("~nobody-here/a")


def test_the_data_lie_at_home(home: Path) -> None:
    data = DataConfig(path="~/d/a.json", seq_len=8, samples_per_group=1, media_root="~/m", tokenizer="~/t/t.json")
    assert (data.path, data.media_path, data.tokenizer_path) == (f"{home}/d/a.json", home / "m", home / "t" / "t.json")
    beside = DataConfig(path="~/d/a.json", seq_len=8, samples_per_group=1)
    assert (beside.media_path, beside.tokenizer_path) == (home / "d", home / "d" / "tokenizer.json")


def test_files_and_workdir_of_the_command_line_and_what_a_file_includes_lie_at_home(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--gin_file=~/a.gin", "--gin_file", "~/b.gin", "--workdir=~/runs/a"]
    got = command.parse_arguments(typed, command.new_parser("train", ""))
    assert got.gin_files == (f"{home}/a.gin", f"{home}/b.gin") and got.workdir == f"{home}/runs/a"
    with pytest.raises(SystemExit):
        command.parse_arguments(["--gin_file=~/a.gin", "--workdir=~nobody-here/runs"], command.new_parser("train", ""))
    assert "~nobody-here is no user's home directory" in capsys.readouterr().err
    (home / "a.gin").write_text("steps = 3\n")
    Path("run.gin").write_text("import test_home\ninclude '~/a.gin'\ntest_home.steps_of.steps = %steps\n")
    assert config.load(["run.gin"], [], steps_of) == 3


def steps_of(steps: int) -> int:
    return steps


@pytest.mark.parametrize(
    "reads",
    [
        lambda: open_source("~/model"),  # init_from, pretrained.*.path, --model and what `convert` reads
        lambda: train.main(["--gin_file=~/model/run.gin", "--workdir=~/run"]),
        lambda: convert.main(["to_hf", "~/model", "--out", "x"]),
        lambda: read_items([ask("?", image="~/model/a.png")][0], [runs.ITEM]),
    ],
)
def test_what_is_missing_is_missing_at_home(
    reads: Callable[[], object], home: Path, capsys: pytest.CaptureFixture
) -> None:
    (home / "model").mkdir()
    try:
        reads()
        message = capsys.readouterr().err
    except ValueError as error:
        message = str(error)
    assert "neither a Hugging Face folder" in message or str(home / "model") in message


def test_prompts_lie_at_home(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = SimpleNamespace(chat=SimpleNamespace(items=[]))
    monkeypatch.setattr(answers, "load", lambda *_, **__: model)
    assert answers.main(["--model=x", "--prompts=~/asked.jsonl"]) == 2
    assert f"{home}/asked.jsonl" in capsys.readouterr().err


def test_what_is_written_is_written_at_home(home: Path) -> None:
    with written("~/new/a.txt") as path:
        path.write_text("a")
    assert (home / "new" / "a.txt").read_text() == "a" and not list(Path.cwd().iterdir())


def test_the_record_of_a_run_at_home_names_the_same_files_from_anywhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gin = runs.write(home)
    settings = ["train/settings.DataConfig.path = ~/train/data.json", "experiment.Experiment.init_from = {llm: ~/m}"]
    run = config.load([str(gin)], settings, Experiment)
    (home / "operative.gin").write_text(config.operative(run))
    monkeypatch.setenv("HOME", "/")
    again = config.load([str(home / "operative.gin")], [], Experiment)
    assert again.data == run.data and again.data.path == str(home / "train" / "data.json")
    with experiment.train_loader(again) as loader:
        assert loader.num_samples == len(json.loads((home / "train" / "data.json").read_text()))
