"""Devices that compute more slowly than the others are named, with their process and stages."""

import json
from types import SimpleNamespace as of
from typing import Any

import jax
import pytest

from hetjax.run import cluster, stragglers
from hetjax.run.stragglers import Stragglers, slow


def test_what_takes_longer_than_so_many_medians_is_slow() -> None:
    assert slow({0: 1.0, 1: 1.1, 2: 0.9, 3: 1.25}, 1.3) == {}
    assert slow({0: 1.0, 1: 1.0, 2: 4.0, 3: 1.0, 4: 2.0}, 1.3) == {2: 4.0, 4: 2.0}
    assert slow({7: 3.0}, 1.3) == {}


def test_the_slow_device_of_another_process_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {("llm", 0): (0,), ("llm", 1): (1,), ("vision", 0): (2,)}
    planned = {key: of(plan=of(device_ids=ids)) for key, ids in stages.items()}
    run: Any = of(spec=of(devices=jax.devices()[:3]), pipeline=of(stages=planned))
    told = lambda said: [said, json.dumps({2: 30 * max(json.loads(said).values())})]
    monkeypatch.setattr(cluster, "tell_all", told)
    Stragglers(run).look(5, ())  # one process: its devices share all cores
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stragglers, "EMULATED", stragglers.EMULATED._replace(slow=20.0))
    Stragglers(run).look(5, ())
    out = capsys.readouterr().out
    assert out.startswith("behind step 5 device 2 (process 0; vision/0) took ") and len(out.splitlines()) == 1
