"""The data: every picture at its own placeholder, one order for all, exact resume. Errors: test_data_errors.py."""

import collections
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import ClassVar

import corpus
import numpy as np
import pytest
from corpus import BOTH, VISION, Spec
from PIL import Image

from hetjax.assets import easy_vqa
from hetjax.data import DataConfig, DataError, ItemSpec, Loader, Pictures, Template, blank, inspect, tokens
from hetjax.data.conversations import Sample
from hetjax.data.items import Header, count

ROOT = Path(__file__).parent.parent
TEXT = Spec({})


def same(a: list, b: list) -> bool:
    return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def random_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Spec]]:
    specs = corpus.random_specs(np.random.default_rng(0), 60)
    return corpus.write(tmp_path_factory.mktemp("data"), specs), specs


SHAPES = [
    dict(seq_len=48, samples_per_group=2, groups=2, pack=True),
    dict(seq_len=96, samples_per_group=1, groups=3, pack=True, lookahead=3),
    dict(seq_len=40, samples_per_group=3, groups=2, pack=False),
    dict(seq_len=40, samples_per_group=4, groups=1, pack=False, shuffle=False, lookahead=1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_picture_lies_at_its_own_placeholders(random_data: tuple[str, list[Spec]], shape: dict) -> None:
    path, specs = random_data
    config = DataConfig(path, **shape)
    with Loader(config, BOTH) as loader:
        seen = [corpus.check(m, config, specs, BOTH, loader.tokenizer) for m in loader.next_step(30)]
        everything = list(itertools.chain(*seen))
        assert set(everything) == corpus.good(specs)
        state = loader.state()
        order = [int(n) for e in range(state["epoch"] + 1) for n in (loader._order(e) if config.shuffle else range(60))]
        read = [n for n in order[: state["epoch"] * 60 + state["place"]] if not specs[n].broken]
        assert collections.Counter(everything + state["waiting"]) == collections.Counter(read), "none lost, none twice"
        assert len(state["waiting"]) <= config.lookahead
        assert {p.sample for p in loader.bad} == {f"id-{n}" for n, s in enumerate(specs) if s.broken}
        assert len(loader.bad) == len(set(loader.bad)), "a bad sample is named once, however many epochs meet it"
        if not config.shuffle and config.lookahead == 1:
            assert everything + state["waiting"] == read


def test_the_thread_that_makes_a_microbatch_prepares_it(tmp_path: Path) -> None:
    names = []

    def prepare(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names.append(threading.current_thread().name)
        return arrays | {"mark": arrays["tokens"] + 1}

    config = DataConfig(corpus.write(tmp_path, [TEXT]), seq_len=16, samples_per_group=1, prefetch=1)
    with Loader(config, [VISION], prepare) as loader:
        for batch in loader.next_step(3):
            np.testing.assert_array_equal(batch["mark"], batch["tokens"] + 1)
    assert set(names) == {"hetjax-data"}


def test_a_microbatch_without_any_picture_has_the_same_shape(tmp_path: Path) -> None:
    path = corpus.write(tmp_path, [TEXT, Spec({"vision": (1,)})])
    config = DataConfig(path, seq_len=16, samples_per_group=1, shuffle=False)
    with Loader(config, [VISION]) as loader:
        text, picture = loader.next_step(2)
        for batch in (text, picture):
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == loader.abstract()
        assert (text["vision.index"] == -1).all() and not text["vision.pixels"].any()
        assert (picture["vision.index"] >= 0).sum() == VISION.rows


@pytest.mark.parametrize("shape", SHAPES)
def test_resuming_anywhere_repeats_the_following_steps_bit_for_bit(
    random_data: tuple[str, list[Spec]], shape: dict
) -> None:
    path, _ = random_data
    rng = np.random.default_rng(1)
    with Loader(DataConfig(path, **shape, prefetch=3, workers=2), BOTH) as loader:
        steps, states = [], [json.dumps(loader.state())]
        for _ in range(12):
            steps.append(loader.next_step(2))
            states.append(json.dumps(loader.state()))
    assert json.loads(states[-1])["epoch"] > 0 and any(json.loads(s)["waiting"] for s in states)
    with Loader(DataConfig(path, **shape, prefetch=0, workers=1), BOTH) as resumed:
        for start in [0, *rng.integers(1, 11, 5)]:
            resumed.restore(json.loads(states[start]))
            assert json.dumps(resumed.state()) == states[start]
            assert all(same(resumed.next_step(2), step) for step in steps[start : start + 2])
            assert json.dumps(resumed.state()) == states[min(start + 2, 12)]


def test_order_depends_on_seed_and_epoch_alone(random_data: tuple[str, list[Spec]]) -> None:
    path, _ = random_data
    made = {}
    for prefetch, workers in ((0, 1), (1, 4), (5, 2)):
        config = DataConfig(path, seq_len=48, samples_per_group=2, pack=True, prefetch=prefetch, workers=workers)
        with Loader(config, BOTH) as loader:
            made[prefetch] = loader.next_step(3) + loader.next_step(5), loader.state()
    assert same(made[0][0], made[1][0]) and same(made[0][0], made[5][0])
    assert made[0][1] == made[1][1] == made[5][1]
    plain = dict(path=path, seq_len=48, samples_per_group=2)
    orders = [Loader(DataConfig(**plain, seed=s), BOTH)._order(e).tolist() for s in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(60)) for order in orders) and len({tuple(o) for o in orders}) == 4
    assert orders[0][:6] == [0, 54, 43, 38, 21, 2], "a saved run must resume in the same order under any NumPy"


def test_one_pass_gives_every_good_sample_once_and_owners_of_answers(random_data: tuple[str, list[Spec]]) -> None:
    path, specs = random_data
    config = DataConfig(path, seq_len=48, samples_per_group=2, groups=2, pack=True)
    with Loader(config, BOTH) as loader:
        loader.next_step(1)  # a pass starts at the first sample wherever training is
        before, found = loader.state(), []
        for batch, owner in loader.one_pass():
            found += corpus.check(batch, config, specs, BOTH, loader.tokenizer)
            np.testing.assert_array_equal(owner >= 0, batch["weights"] > 0)
            for n, target in zip(owner[owner >= 0], batch["targets"][owner >= 0], strict=True):
                assert loader.tokenizer.id_to_token(target) in (f"a{n}", "<end>")
        assert sorted(found) == sorted(corpus.good(specs))
        assert loader.state() == before
        assert loader.samples[found[0]].turns[1] == f"a{found[0]}"
    with Loader(DataConfig(path, seq_len=48, samples_per_group=50, groups=2), BOTH) as loader:
        (batch, owner), *_ = loader.one_pass()
        assert not batch["weights"][-1].any() and (owner[-1] == -1).all(), "the last microbatch ends with empty rows"


def test_a_sample_that_does_not_fit_is_the_first_of_the_next_microbatch(tmp_path: Path) -> None:
    one, three = Spec({"vision": (1,)}), Spec({"vision": (3,)})
    specs = [one, one, three, one, TEXT, one]
    path = corpus.write(tmp_path, specs)
    config = DataConfig(path, seq_len=20, samples_per_group=4, shuffle=False)
    with Loader(config, [VISION]) as loader:
        first, second = loader.next_step(2)
        assert corpus.check(first, config, specs, [VISION], loader.tokenizer) == [0, 1, 3, 4]
        assert loader.tokenizer.id_to_token(second["tokens"][0, 12]) == "q2"


def test_picture_values_are_rescaled_resized_and_normalised(tmp_path: Path) -> None:
    reader = Pictures(height=4, width=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    pixels = lambda name: reader.read(tmp_path / name)["pixels"]
    shown = lambda name: reader.to_rgb(reader.read(tmp_path / name))
    raw = np.random.default_rng(0).integers(0, 256, (4, 8, 3)).astype(np.uint8)
    Image.fromarray(raw).save(tmp_path / "same.png")
    got = pixels("same.png")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (raw / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0], atol=1e-6)
    np.testing.assert_array_equal(reader.to_rgb({"pixels": got}), raw)
    big = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 20, 3)).astype(np.uint8))
    big.save(tmp_path / "big.png")
    resized = np.asarray(big.resize((8, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(shown("big.png"), resized)
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        Image.new("RGB", (8, 4), (0, 0, 0)).convert(mode).save(tmp_path / "mode.tiff")
        assert not shown("mode.tiff").any()
    palette = Image.new("P", (8, 4), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    assert shown("palette.png")[0, 0].tolist() == [200, 100, 50]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Files that hold a number: how many rows they take."""

    noun: ClassVar[str] = "number"
    rate: ClassVar[str] = "numbers_per_second"
    arrays = types.MappingProxyType({"length": ((), np.dtype(np.int32))})
    blank = types.MappingProxyType({"length": -1.0})

    def look(self, path: Path) -> Header:
        return Header(int(path.read_text()))

    def read(self, path: Path) -> dict[str, np.ndarray]:
        return {"length": np.int32(path.read_text())}


def test_an_item_takes_as_many_positions_as_it_needs(tmp_path: Path) -> None:
    item = ItemSpec("n", 5, Lengths(), slots_per_group=3, field="number", placeholder="<n>")
    lengths = [(2, 5), (), (1,), (4, 3, 5)]
    entries = []
    for n, sizes in enumerate(lengths):
        for size in sizes:
            (tmp_path / f"{size}.txt").write_text(str(size))
        turns = [{"from": "human", "value": "<n>" * len(sizes) + f"q{n}"}, {"from": "gpt", "value": f"a{n}"}]
        entries.append({"number": [f"{size}.txt" for size in sizes], "conversations": turns})
    corpus.write_tokenizer(tmp_path, len(lengths))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    config = DataConfig(str(tmp_path / "data.json"), seq_len=15, samples_per_group=2, groups=2, shuffle=False)
    with Loader(config, [item]) as loader:
        (first, _), (second, _) = loader.one_pass()
        places = [(first, 0, 0, 0), (first, 1, 0, 1), (first, 2, 3, 2), (second, 0, 0, 3)]  # the last needs three slots
        for batch, row, slot, n in places:
            wanted = [(slot + k) * 5 + r for k, size in enumerate(lengths[n]) for r in range(size)]
            assert batch["n.index"][row].tolist() == wanted + [-1] * (15 - len(wanted))
            used = int((batch["segment_ids"][row] > 0).sum())
            words = [loader.tokenizer.id_to_token(t) for t in batch["tokens"][row, :used]]
            assert words == ["<pad>"] * len(wanted) + [f"q{n}", f"a{n}"]
        assert first["n.length"].tolist() == [2, 5, 0, 1, 0, 0] and second["n.length"].tolist() == [4, 3, 5, 0, 0, 0]
        assert (count(first, item), count(second, item)) == (3, 3)
        assert blank(first, [item])["n.length"].tolist() == [-1] * 6


def test_template_surrounds_turns_and_trains_on_answers_and_end_tokens_only(tmp_path: Path) -> None:
    corpus.write_tokenizer(tmp_path, 2)
    template = Template(start="is", human_prefix="so ", human_suffix=" ,", answer_suffix=" , ")
    config = DataConfig(str(tmp_path / "x.json"), seq_len=32, samples_per_group=1, template=template)
    tokenizer = tokens.load_tokenizer(config, [VISION])
    sample = Sample(0, "x", ("<image> q0", "a0", "q1", "a1"), {"vision": ("a",)})
    made = tokens.encode(sample, tokens.Speller(tokenizer, [VISION], template), config, {"vision": [4]})
    words = [tokenizer.id_to_token(t) for t in [*made.tokens, made.targets[-1]]]
    assert " ".join(words) == "isso <pad> <pad> <pad> <pad> q0 , a0 <end> , so q1 , a1 <end>".replace("isso", "<unk>")
    assert [tokenizer.id_to_token(t) for t in made.targets[made.weights > 0]] == ["a0", "<end>", "a1", "<end>"]
    assert made.starts == {"vision": (1,)}


def test_long_samples_are_truncated_or_skipped_and_counted(tmp_path: Path) -> None:
    fits, long = Spec({"vision": (1,)}, words=2), Spec({"vision": (1, 0)}, turns=2, words=4)
    cut_picture, no_answer = Spec({"vision": (0, 2)}, turns=2, words=2), Spec({"vision": (1,)}, words=9)
    specs = [fits, long, cut_picture, no_answer]
    path = corpus.write(tmp_path, specs)
    shape = dict(path=path, seq_len=12, samples_per_group=4, shuffle=False)
    with Loader(DataConfig(**shape), [VISION]) as loader:
        ((batch, owner),) = loader.one_pass()
        assert (loader.tally.truncated, loader.tally.too_long) == ({1}, {2, 3})
        words = [word for word, _, _ in corpus.expected(1, long, [VISION])]
        assert [loader.tokenizer.id_to_token(t) for t in batch["tokens"][1]] == words[:12]
        assert [loader.tokenizer.id_to_token(t) for t in batch["targets"][1]] == words[1:13]
        assert set(owner.ravel().tolist()) == {-1, 0, 1}
    with Loader(DataConfig(**shape, on_long="skip"), [VISION]) as loader:
        ((_, owner),) = loader.one_pass()
        assert (loader.tally.truncated, loader.tally.too_long) == (set(), {1, 2, 3})
        assert set(owner.ravel().tolist()) == {-1, 0}


def test_blank_fill_and_waiting_time(tmp_path: Path) -> None:
    path = corpus.write(tmp_path, [Spec({"vision": (1,)})] * 4)
    with Loader(DataConfig(path, seq_len=12, samples_per_group=2, prefetch=0), [VISION]) as loader:
        (batch,) = loader.next_step(1)
        empty = blank(batch, [VISION])
        assert batch["vision.pixels"].any() and not empty["vision.pixels"].any()
        assert all(np.array_equal(empty[k], batch[k]) for k in batch if k != "vision.pixels")
        assert loader.fill() == {"tokens": 6 / 12, "vision": 2 / 4}
        assert loader.seconds_waited > 0
        before = loader.seconds_waited
        loader.next_step(1)
        assert 0 < loader.last_wait == loader.seconds_waited - before
        state = loader.state()
        loader.close()
        assert loader.state() == state
        loader.next_step(1)
        assert loader.state() != state


def test_inspection_shows_texts_masks_and_pictures(tmp_path: Path) -> None:
    specs = [Spec({"vision": (2,), "chart": (1,)}), TEXT]
    path = corpus.write(tmp_path, specs)
    config = DataConfig(path, seq_len=32, samples_per_group=1, groups=2, pack=True, shuffle=False)
    with Loader(config, BOTH) as loader:
        ((batch, _),) = loader.one_pass()
        text = inspect.describe(batch, loader.tokenizer, BOTH, groups=2)
        for part in (
            "segment 1: '<image><image><plot>q0 a0'",
            "trained on: 'a0 <end>'",
            "vision slot 1, rows 0..3",
            "chart slot 0, rows",
        ):
            assert part in text
        assert "segment 2: 'q1 a1'" in text and "row 1 (group 1): 0 of 32" in text
        assert "\x1b[38;2;0;0;50;" in inspect.describe(batch, loader.tokenizer, BOTH, colour=True)
        written = inspect.write_pictures(batch, BOTH, tmp_path / "out")
        assert [p.name for p in written] == ["vision-0000.png", "vision-0001.png", "chart-0000.png"]
        with Image.open(written[1]) as image:
            assert image.size == (5, 6) and image.getpixel((0, 0)) == corpus.colour(0, 1)


def test_data_needs_no_jax() -> None:
    code = "import sys, hetjax.data, hetjax.data.inspect, hetjax.assets.easy_vqa; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_easy_vqa_becomes_llava_json_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("easy_vqa", reason="needs the extra `demo`")
    real, renamed = easy_vqa.os.rename, []

    def killed(source: Path, target: Path) -> None:
        renamed.append(target.name)
        if target.name == "test.json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(easy_vqa.os, "rename", killed)
        easy_vqa.prepare(tmp_path)
    assert renamed == ["images", "tokenizer.json", "test.json"]
    script = [sys.executable, str(ROOT / "scripts" / "fetch.py"), "easy_vqa", "--out", str(tmp_path)]
    run = subprocess.run(script, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "test.json", "tokenizer.json", "train.json"]
    written = (tmp_path / "train.json").stat().st_mtime_ns
    assert easy_vqa.prepare(tmp_path) == tmp_path and (tmp_path / "train.json").stat().st_mtime_ns == written
    item = ItemSpec("vision", 16, Pictures(height=64, width=64), slots_per_group=8)
    for name, size in (("train", 38575), ("test", 9673)):
        with Loader(DataConfig(str(tmp_path / f"{name}.json"), seq_len=32, samples_per_group=8), [item]) as loader:
            assert (loader.num_samples, loader.vocab_size, loader.bad) == (size, 32, [])
            (batch,) = loader.next_step(1)
            assert batch["weights"].sum() == 16 and batch["vision.pixels"].any((1, 2, 3)).all()
            unknown = loader.tokenizer.token_to_id("<unk>")
            texts = {sample.turns[0].removeprefix("<image>") for sample in loader.samples.values()}
            assert all(unknown not in loader.tokenizer.encode(text).ids for text in texts)


def test_easy_vqa_names_the_extra_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise easy_vqa.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(easy_vqa.importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"easy-vqa is not installed.*hetjax\[demo\]"):
        easy_vqa.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()
