"""What a run was asked for stays in its workdir, whatever is asked for later."""

from pathlib import Path

import pytest

from hetjax.run import record


def test_what_a_run_was_started_with_outlives_other_settings(tmp_path: Path) -> None:
    def write(text: str, resumed: int | None) -> dict[str, str]:
        record.write(tmp_path, {"config.gin": text}, resumed)
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert write("a", None) == {"config.gin": "a"}
    assert write("b", None) == {"config.gin": "b"}  # nothing of the first was saved: the run starts over
    assert write("b", 10) == {"config.gin": "b"}
    assert write("c", 20) == {"config.gin": "c", "config_until_step_20.gin": "b"}
    assert write("d", 20) == {"config.gin": "d", "config_until_step_20.gin": "b"}  # no step was c's
    assert write("b", 30)["config_until_step_30.gin"] == "d"


def test_what_a_finished_run_was_trained_with_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.write(tmp_path, {record.OPERATIVE: "a"}, None)
    record.write(tmp_path, {record.OPERATIVE: "a"}, 30, trains=False)
    assert not capsys.readouterr().out
    record.write(tmp_path, {record.OPERATIVE: "b", "config.gin": "b"}, 30, trains=False)
    assert (tmp_path / record.OPERATIVE).read_text() == "a" and (tmp_path / "config.gin").read_text() == "b"
    assert f"no step is left to train: {tmp_path / record.OPERATIVE} stays as it is" in capsys.readouterr().out
