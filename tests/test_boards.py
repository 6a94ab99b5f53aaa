"""Viewers beside a run's own files: the same numbers, and one run there for one that resumes."""

import io
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetjax.run import boards, metrics, record
from hetjax.run.samples import Sample

BLOCK, HEADER = 32768, 7  # bytes of wandb's files: of a block, and of what stands before the file and each record


def run(directory: Path, steps: range, **options: Any) -> None:
    with metrics.open_writers(directory, num_steps=100, stream=io.StringIO(), **options) as writers:
        for step in steps:
            writers.write(step, {"loss": step / 4})


def test_tensorboard_has_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorboard = pytest.importorskip("tensorboardX")
    made: list[dict[str, Any]] = []

    class Recorder(tensorboard.SummaryWriter):  # type: ignore[misc, name-defined]
        def __init__(self, directory: str, **options: Any) -> None:
            made.append(options | {"scalars": []})
            super().__init__(directory, **options)

        def add_scalar(self, *scalar: Any, **_: Any) -> None:
            made[-1]["scalars"].append(scalar)
            super().add_scalar(*scalar)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Recorder)
    run(tmp_path, range(1, 3), tensorboard=True)
    run(tmp_path, range(2, 3), tensorboard=True, resumed_step=1)
    assert [m["scalars"] for m in made] == [[("loss", 0.25, 1), ("loss", 0.5, 2)], [("loss", 0.5, 2)]]
    assert [m["purge_step"] for m in made] == [0, 2]
    assert sum(file.stat().st_size > 0 for file in (tmp_path / "tensorboard").iterdir()) >= 1


@pytest.mark.parametrize(
    ("package", "setting", "value"), [("tensorboardX", "tensorboard", True), ("wandb", "wandb", "p")]
)
def test_a_viewer_that_is_not_installed_is_a_clear_error(
    package: str, setting: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{setting}={value!r} needs the package {package}.*hetjax\[{setting}\]"):
        boards.check(**{"tensorboard": False, "wandb": "", setting: value})
    boards.check(tensorboard=False, wandb="")


def test_a_projects_name_that_wandb_does_not_take_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="wandb='a/b#c' has # /, which no project's name may; give it another name"):
        boards.check(tensorboard=False, wandb="a/b#c")


def test_wandb_offline_has_the_same_values_and_one_run_where_a_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    calls: dict[str, dict] = {"first": {}, "resumed": {"resumed_step": 1}, "anew": {}}  # each in a folder of its own
    for name, options in calls.items():
        directory = tmp_path / name
        directory.mkdir()
        (directory / record.OPERATIVE).write_text("import b\nb.C.d = 3\n")
        if name != "first":
            shutil.copy(tmp_path / "first" / boards.WANDB, directory)
        run(directory, range(1 + bool(options), 3), wandb="project", **options)
    wandb.teardown()  # waits for its own process, which writes
    found = [list(_records(*(tmp_path / name).glob("wandb/offline-run-*/*.wandb"))) for name in calls]
    first, resumed, anew = found
    assert [_history(records) for records in found] == [[(1, 0.25), (2, 0.5)], [(2, 0.5)], [(1, 0.25), (2, 0.5)]]
    assert _run(first) == _run(resumed) == (_run(first)[0], {"b.C.d": "3"}) and _run(anew)[0] != _run(first)[0]


def test_wandb_shows_samples_with_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sample = Sample("7", "what?", "a square", "a circle", (np.zeros((4, 4, 3), np.uint8),))
    with metrics.open_writers(tmp_path, num_steps=9, wandb="project", stream=io.StringIO()) as writers:
        writers.show(3, [sample])
    wandb.teardown()
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["7", "what?", "a square", "a circle"]]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/sample/*.png"))) == 1


def test_wandb_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ValueError, match="wandb='p': api_key not configured; log in by `wandb login`, or set WANDB_MODE"
    ):
        run(tmp_path, range(1), wandb="p")


def _records(path: Path) -> Iterator[Any]:
    """What a file of wandb holds, whose records are framed as LevelDB's logs are; each in one block here."""
    from wandb.proto import wandb_internal_pb2

    data, place = path.read_bytes(), HEADER
    assert len(data) < BLOCK
    while place < len(data):
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        assert kind == 1  # a whole record
        found = wandb_internal_pb2.Record()
        found.ParseFromString(data[place + HEADER : place + HEADER + length])
        yield found
        place += HEADER + length


def _history(records: list[Any]) -> list[tuple[int, float]]:
    rows = [
        {item.nested_key[0] or item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.history.item
    ]
    return [(row["step"], row["loss"]) for row in rows]


def _run(records: list[Any]) -> tuple[str, dict[str, str]]:
    (found,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    return found.run_id, {u.key: json.loads(u.value_json) for u in found.config.update if not u.key.startswith("_")}
