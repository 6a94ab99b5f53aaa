"""What was written before the modules had rooms goes on: a workdir resumes, exports and answers, and gin files load."""

import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import runs

from hetjax import convert, generate, train
from hetjax.core.layout import Layout
from hetjax.run import config
from hetjax.run.experiment import Experiment
from hetjax.run.record import OPERATIVE

OLD = Path(__file__).parent / "data" / "workdir_before_rooms.tar.gz"  # 4 steps; run.gin, train/, held_out/ and run/


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the old run and what it read, where commands are typed."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_workdir_of_before_resumes_where_the_code_of_before_went(old: Path) -> None:
    assert train.main(["--gin_file=run/config.gin", "--workdir=run", "--gin.experiment.Experiment.steps=6"]) == 0
    losses = runs.records(old / "run")
    assert losses[5] == pytest.approx(3.032708, abs=1e-4) and losses[6] == pytest.approx(2.903349, abs=1e-4)
    assert "from hetjax.run import experiment\n" in (old / "run" / OPERATIVE).read_text()


def test_a_workdir_of_before_answers_and_is_exported(old: Path) -> None:
    model = generate.load("run")
    (answer,) = model([generate.ask("<image> q0", image="train/vision-0-0.png")], max_new_tokens=8)
    assert answer.text == "q11 q11 q11 a5 a3 q11 q3 a5"
    assert convert.main(["to_hf", "run", "--out", "exported"]) == 0
    kind = json.loads((old / "exported" / "config.json").read_text())["architectures"]
    assert kind == ["LlavaForConditionalGeneration"] and (old / "exported" / "model.safetensors").is_file()


def test_data_inspect_is_called_as_it_was(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data", "inspect", "--gin_file=run.gin", "--rows=1"])
    monkeypatch.delitem(sys.modules, "hetjax.inspect", raising=False)  # another test may have imported it
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hetjax.data", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("[0] ")


@pytest.mark.parametrize(
    ("imports", "layout"),
    [
        ("from hetjax import experiment, layout", "layout"),
        ("from hetjax import experiment, layout as cut", "cut"),
        ("from hetjax import experiment\nimport hetjax.layout as cut", "cut"),
        ("from hetjax import experiment\nimport hetjax.layout", "hetjax.layout"),
        ("from hetjax.run import experiment\nfrom hetjax.core import layout", "layout"),
    ],
)
def test_gin_files_may_name_modules_as_they_were_called(old: Path, imports: str, layout: str) -> None:
    text = (old / "run.gin").read_text().replace("from hetjax import experiment, layout, optimizer", imports)
    text = text.replace("layout.Layout", f"{layout}.Layout") + "\nfrom hetjax import optimizer\n"
    (old / "run.gin").write_text(text)
    assert config.load(["run.gin"], [], Experiment).llm.layout == Layout(devices="1")
