"""What stands where is decided by texts and headers: a file that cannot be decoded masks its sample and moves none."""

import json
import shutil
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
import soundfile
from corpus import BOTH, VISION, Spec

from hetjax.data import DataConfig, DataError, ItemSpec, Loader, Pictures, Sounds

SHAPES = [
    dict(seq_len=48, samples_per_group=2, groups=2, pack=True),
    dict(seq_len=40, samples_per_group=3, groups=2, pack=False, lookahead=2),
]
SPECS = corpus.random_specs(np.random.default_rng(4), 40)
SEEN = [n for n, spec in enumerate(SPECS) if not spec.broken and sum(map(sum, spec.pictures.values()))]
HALVED = set(SEEN[::3])


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two data sets that differ in this: some pictures of the second can be opened, but not decoded."""
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    corpus.write(whole, SPECS)
    shutil.copytree(whole, broken, dirs_exist_ok=True)
    for n in HALVED:
        halve(next(broken.glob(f"*-{n}-0.png")))
    return str(whole / "data.json"), str(broken / "data.json")


def read(path: str, steps: int, **settings: Any) -> tuple[Loader, list[dict[str, np.ndarray]], list[str]]:
    with Loader(DataConfig(path, **settings), BOTH) as loader:
        found, states = [], []
        for _ in range(steps):
            states.append(json.dumps(loader.state()))
            found += loader.next_step(2)
    return loader, found, states


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_that_cannot_be_decoded_moves_nothing_and_weighs_nothing(
    twins: tuple[str, str], shape: dict[str, Any]
) -> None:
    (_, wanted, places), (loader, found, same) = (read(path, 15, **shape) for path in twins)
    assert places == same
    assert loader.tally.masked == HALVED and {f"id-{n}" for n in HALVED} <= {p.sample for p in loader.bad}
    assert len(loader.bad) == len(set(loader.bad))
    masked = 0
    for right, batch in zip(wanted, found, strict=True):
        for name in ("tokens", "targets", "positions", "segment_ids"):
            np.testing.assert_array_equal(batch[name], right[name])
        hit = (right["weights"] > 0) & (batch["weights"] == 0)
        masked += hit.sum()
        inside = np.zeros_like(hit)
        for row, place in zip(*np.nonzero(hit), strict=True):
            inside[row] |= right["segment_ids"][row] == right["segment_ids"][row, place]
        np.testing.assert_array_equal(batch["weights"], np.where(inside, 0, right["weights"]))
        for item in BOTH:
            index = right[f"{item.name}.index"]
            np.testing.assert_array_equal(batch[f"{item.name}.index"], np.where(inside, -1, index))
            slots = np.isin(np.arange(len(right[f"{item.name}.pixels"])), index[inside & (index >= 0)] // item.rows)
            pixels = np.where(slots[:, None, None, None], 0, right[f"{item.name}.pixels"])
            np.testing.assert_array_equal(batch[f"{item.name}.pixels"], pixels)
    assert masked


def test_a_resumed_run_masks_the_same(twins: tuple[str, str]) -> None:
    _, steps, states = read(twins[1], 8, **SHAPES[0])
    for start in (1, 4, 7):
        with Loader(DataConfig(twins[1], **SHAPES[0], prefetch=0, workers=1), BOTH) as resumed:
            resumed.restore(json.loads(states[start]))
            for step in steps[2 * start :]:
                (again,) = resumed.next_step(1)
                assert all(np.array_equal(again[name], step[name]) for name in step)


def test_whoever_decodes_nothing_builds_the_same_texts(twins: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted, _ = read(twins[1], 6, **SHAPES[0])
    monkeypatch.setattr(Pictures, "read", lambda *_: {})
    _, found, _ = read(twins[1], 6, **SHAPES[0])
    assert all(
        np.array_equal(right[name], batch[name])
        for right, batch in zip(wanted, found, strict=True)
        for name in ("tokens", "targets", "positions", "segment_ids")
    )


def test_a_masked_sample_is_neither_scored_nor_asked(tmp_path: Path) -> None:
    path = corpus.write(tmp_path, [Spec({"vision": (1,)})] * 3)
    halve(tmp_path / "vision-1-0.png")
    with Loader(DataConfig(path, seq_len=12, samples_per_group=3, shuffle=False), [VISION]) as loader:
        ((batch, owner),) = loader.one_pass()
        ((_, asked),) = loader.questions(3)
        assert set(owner.ravel().tolist()) == set(asked.ravel().tolist()) == {-1, 0, 2}
        assert batch["weights"].sum(axis=1).tolist() == [2, 0, 2] and (batch["vision.index"][1] == -1).all()
        assert "bad samples: 1 (1 of them masked where they stand)" in loader.tally.report()
    stopping = DataConfig(path, seq_len=12, samples_per_group=3, on_bad_item="stop")
    with (
        Loader(stopping, [VISION]) as loader,
        pytest.raises(DataError, match=r"'id-1' \(.*vision-1-0.png\): .*truncated"),
    ):
        loader.next_step(1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_data_set_of_masked_samples_ends_instead_of_spinning(tmp_path: Path, prefetch: int) -> None:
    path = corpus.write(tmp_path, [Spec({"vision": (1,)})] * 3)
    for n in range(3):
        halve(tmp_path / f"vision-{n}-0.png")
    config = DataConfig(path, seq_len=12, samples_per_group=1, prefetch=prefetch)
    left = "every one of its 3 samples is left out, 3 as bad"
    with Loader(config, [VISION]) as loader, pytest.raises(DataError, match=left):
        loader.next_step(9)


def test_a_clip_that_cannot_be_decoded_keeps_the_place_that_its_header_asks_for(tmp_path: Path) -> None:
    reader = Sounds(80, 100, 100, lambda frames: frames // 10)
    item = ItemSpec("audio", 10, reader, slots_per_group=3, field="audio", placeholder="<audio>")
    entries = []
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.flac", 0.1 * np.random.default_rng(n).normal(size=8000), 16000)
        turns = [{"from": "human", "value": f"<audio> q{n}"}, {"from": "gpt", "value": f"a{n}"}]
        entries.append({"id": f"id-{n}", "audio": f"{n}.flac", "conversations": turns})
    corpus.write_tokenizer(tmp_path, 3)
    (tmp_path / "data.json").write_text(json.dumps(entries))
    content = (tmp_path / "1.flac").read_bytes()
    (tmp_path / "1.flac").write_bytes(content[:6000] + bytes(len(content) - 6000))
    config = DataConfig(str(tmp_path / "data.json"), seq_len=40, samples_per_group=3, pack=True, shuffle=False)
    with Loader(config, [item]) as loader:
        ((batch, owner),) = loader.one_pass()
        assert [p.sample for p in loader.bad] == ["id-1"] and loader.tally.masked == {1}
    assert set(owner.ravel().tolist()) == {-1, 0, 2}
    assert batch["segment_ids"].max(axis=1).tolist() == [3, 0, 0]
    assert (batch["audio.index"][0] >= 0).sum() == 10 and (batch["segment_ids"][0] == 2).sum() == 7
