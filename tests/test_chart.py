"""A schedule as a picture, in text and SVG, and the command that draws it."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import runs
from test_forecast import dealt, split
from test_schedule import chain, vlm

from hetjax import schedule
from hetjax.core.forecast import forecast
from hetjax.core.tasks import Cost
from hetjax.run import chart

BOX = "{http://www.w3.org/2000/svg}g"


def test_the_text_is_a_line_per_devices_with_every_task() -> None:
    nodes = vlm(vision=[[0, 1]], llm=[[3, 5]])
    found = forecast(nodes, 2, costs={("vision", 0): Cost(2, 4), ("llm", 0): Cost(4, 8)})
    assert chart.text(found, 44).splitlines() == [
        "devices 0-1 |v0v1          V0==        V1==|",
        "devices 3,5 |  l0--L0======l1--L1======    |",
        "v vision, l llm; small letters are forwards, capitals backwards, each with its microbatch",
    ]


def test_stages_that_share_devices_share_a_line_and_are_told_apart() -> None:
    found = forecast(dealt("llm", 2, 2), 2, costs={("llm", n): Cost(3, 3) for n in range(4)})
    first, second, _ = chart.text(found, 41).splitlines()
    assert first == "device 0 |l0-l1-l'0l'1   L'0   L'1L0=L1=|"
    assert second == "device 1 |   l0-l1-l'0L'0l'1L'1L0=L1=   |"
    mixed = chart.rows(forecast([*chain("a", [[0, 1]]), *chain("a2", [[1, 2]], (("a", 0),))], 1))
    assert [(row.devices, len(row.spans)) for row in mixed] == [((0,), 2), ((1,), 4), ((2,), 2)]


def test_the_halves_of_backwards_are_told_apart() -> None:
    found = forecast(split(chain("llm", [[0], [1]])), 2, kind="zerobubble")
    first, second, said = chart.text(found, 39).splitlines()
    assert first == "device 0 |l0--l1--    L0==L+0+L1==L+1+|"
    assert second == "device 1 |    l0--L0==l1--L1==L+0+L+1+|"
    assert said.startswith("l llm; small letters are forwards, capitals backwards, + weights' gradients, ")
    assert schedule.table(found).splitlines() == [
        "stage         works  in flight  at most   kept  at most",
        "llm/0           86%          2        2      2        2",
        "llm/1           86%          1        1      2        2",
    ]
    drawing = chart.draw({"": found})
    colours = {box.told.split()[0]: int(box.colour[1:3], 16) for box in drawing.boxes if box.label}
    assert colours["forward"] > colours["backward"] > colours["weights'"] > 0


def test_the_svg_has_a_box_for_each_task_with_its_name() -> None:
    found = forecast(vlm(vision=[[0]], llm=[[1], [2]]), 3)
    tree = ElementTree.fromstring(chart.draw({"a < b": found}).svg())
    names = [box[0].text for box in tree.iter(BOX)]
    assert len(names) - 2 == len(found.spans) == 18 and "backward of llm/1, microbatch 2" in names
    assert "a < b" in {text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")}


def test_the_command_draws_a_run_and_says_what_it_promises(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hetjax.schedule", f"--gin_file={runs.write(tmp_path)}", f"--svg={tmp_path}/a/b.svg"]
    environment = {**runs.environment(), "COLUMNS": "80"}
    ran = subprocess.run(line, env=environment, cwd=runs.ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "\ndevices 0-1 |v0" in ran.stdout and "\nvision/0 " in ran.stdout
    assert "schedule 1f1b, 2 microbatches, simulated: devices idle " in ran.stdout
    assert "% of text-only throughput; microbatches in flight vision 2, llm 1\n" in ran.stdout
    assert len(list(ElementTree.parse(tmp_path / "a" / "b.svg").iter(BOX))) == 8 + 2
    assert os.listdir(tmp_path / "a") == ["b.svg"]
    ran = subprocess.run([*line, "--phase=2"], env=environment, cwd=runs.ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == "error: --phase=2; the run has 1 to 1\n"


def test_a_picture_of_another_name_is_refused_before_the_run_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule.main(["--gin_file=none.gin", "--svg=a.png"]) == 2
    assert capsys.readouterr().err == "error: --svg=a.png; its name must end in .svg\n"
