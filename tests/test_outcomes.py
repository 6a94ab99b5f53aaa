"""What the trials of faults leave: a table that says what was tried, and lines from which an ended script goes on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(runs.ROOT / "scripts"))
    import outcomes

    return outcomes


def test_a_page_gets_the_table_of_all_trials_that_were_written_whole(outcomes: Any, tmp_path: Path) -> None:
    file, page = tmp_path / "trials.jsonl", tmp_path / "cluster.md"
    shutil.copy(runs.ROOT / "docs" / "cluster.md", page)
    before = page.read_text()
    tried = [
        outcomes.Outcome("kill", 2, 0, seconds=3.4, codes=(137,)),
        outcomes.Outcome("kill", 2, 1, wrong="hangs"),
        outcomes.Outcome("kill", 2, 0, seed=1, seconds=2.0, codes=(137,)),  # another trial than the first
        outcomes.Outcome("kill", 4, 0, seconds=5.6, codes=(1, 137)),
        outcomes.Outcome("stop", 4, 0, seconds=23.0, codes=(3,)),
        outcomes.Outcome("fire", 4, 0),
    ]
    for outcome in tried:
        outcomes.add(file, outcome)
    file.write_text(file.read_text() + '{"fault": "kill", "proc')
    assert outcomes.read(file) == tried
    tried[1] = outcomes.Outcome("kill", 2, 1, wrong="hangs still")
    outcomes.add(file, tried[1])
    assert outcomes.read(file) == tried
    table = outcomes.table(outcomes.read(file), ["stop", "kill", "flood"])
    assert table.splitlines() == [
        "| fault | 2 processes | 4 processes | slowest end | exit status |",
        "| --- | --- | --- | --- | --- |",
        "| stop |  | 1 of 1 | 23 s | 3 |",
        "| kill | 2 of 3 | 1 of 1 | 6 s | 1, 137 |",
    ]
    outcomes.put_in(page, table)
    outcomes.put_in(page, table)  # in its own place
    after = page.read_text()
    head, tail = before.split("| fault |")[0], before.split("Orbax has no checksum")[1]
    assert after == f"{head}{table}\n\nOrbax has no checksum{tail}"
