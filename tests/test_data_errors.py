"""What is wrong with data or settings is said with the setting or the sample, the value, the rule, the way out."""

import json
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus
import pytest
from corpus import CHART, VISION, Spec
from PIL import Image
from tokenizers import AddedToken, normalizers

from hetjax.data import DataConfig, DataError, ItemSpec, Loader, Pictures, Template
from hetjax.data.items import check_items

HUMAN = {"from": "human", "value": "<image> q0"}
GPT = {"from": "gpt", "value": "a0"}
GOOD = {"id": "fine", "conversations": [{"from": "human", "value": "q0"}, GPT]}
SHAPE = dict(seq_len=16, samples_per_group=1)
PICTURES = Pictures(height=8, width=8)


def entry(*turns: Any, image: Any = "vision-0-0.png") -> dict[str, Any]:
    return {"id": "odd", "image": image, "conversations": list(turns)}


def load(directory: Path, text: str, name: str = "data.json", **settings: Any) -> Loader:
    """A loader of a file with this text; the good picture vision-0-0.png and tokenizer.json lie beside it."""
    corpus.write(directory, [Spec({"vision": (1,)})])
    (directory / name).write_text(text)
    return Loader(DataConfig(str(directory / name), **(SHAPE | settings)), [VISION])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (5, r"it is a number, but must be an object"),
        ({"id": "odd"}, r"it has no conversations"),
        (entry({"from": "human"}, GPT), r"turn 0 must be .*, not \{'from': 'human'\}"),
        (
            entry({"from": "robot", "value": "<image>"}, GPT),
            r"turn 0 is from 'robot'; it must be one of human, user, gpt, assistant, system",
        ),
        (
            entry(HUMAN, GPT | {"reasoning_content": "hm"}),
            r"turn 1 has reasoning_content='hm', which is not trained on",
        ),
        (entry(HUMAN, GPT | {"tool_calls": [{"name": "f"}]}), r"turn 1 has tool_calls=.*; write it as text"),
        (entry(HUMAN, GPT) | {"tools": [{"name": "f"}]}, r"it has tools=.*, which is not trained on; write it as text"),
        (entry(HUMAN, GPT, HUMAN), r"ends on human, so its last question has no answer"),
        (entry(HUMAN, HUMAN), r"turn 1 is from human; human and gpt take turns, human begins"),
        (
            entry({"from": "human", "value": "<image><image>"}, GPT),
            r"its questions have 2 <image>, image names 1 files",
        ),
        (entry(HUMAN, GPT, image=None), r"its questions have 1 <image>, image names 0 files"),
        (entry(HUMAN, {"from": "gpt", "value": "<image>"}), r"an answer contains <image>; it may stand in questions"),
        (entry(HUMAN, GPT, image=7), r"image=7; it must be a file name or a list"),
        (entry(HUMAN, GPT, image="gone.png"), r"gone\.png\): there is no such file"),
        (entry(HUMAN, GPT, image="text.png"), r"text\.png\): cannot be read as a picture: cannot identify"),
        (
            entry(HUMAN, GPT, image="bomb.png"),
            r"bomb\.png\): cannot be read as a picture: it is 60000 x 60000 pixels, more",
        ),
        (entry(HUMAN, GPT, image="large.png"), r"large\.png\): .*it is 20000 x 7000 pixels, more than 134217728"),
        (entry(HUMAN, GPT, image="deep.png"), r"deep\.png\): .*its mode I;16 has more than 8 bits a channel; convert"),
        (entry(HUMAN, GPT, image="folder"), r"folder\): cannot be read as a picture: .*[Dd]irectory"),
    ],
)
def test_a_bad_sample_is_named_and_skipped_or_stops_the_run(
    tmp_path: Path, bad: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_odd_pictures(tmp_path)
    text = json.dumps([GOOD, bad, GOOD])
    with caplog.at_level(logging.WARNING), load(tmp_path, text) as loader:
        for _ in range(4):  # eight samples: several epochs
            for batch in loader.next_step(2):
                assert batch["weights"].sum() == 2 and (batch["vision.index"] == -1).all()
        (problem,) = loader.bad
        assert len([r for r in caplog.records if "skipped sample" in r.getMessage()]) == 1
    name = "1" if bad == 5 else "odd"
    with pytest.raises(DataError, match=rf"sample '{name}' \(.*{reason}.*; repair it, or set .*on_bad_item='skip'"):
        load(tmp_path, text, on_bad_item="stop").next_step(3)
    assert problem.sample == name and str(tmp_path) in problem.path


def write_odd_pictures(directory: Path) -> None:
    """Text, two headers that claim many pixels, 16 bits a channel, a directory."""
    (directory / "text.png").write_text("hello")
    (directory / "bomb.png").write_bytes(png(60000, 60000))
    (directory / "large.png").write_bytes(png(20000, 7000))
    Image.new("I;16", (8, 8), 60000).save(directory / "deep.png")
    (directory / "folder").mkdir()


def png(width: int, height: int) -> bytes:
    """The start of a grey PNG of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.json", "[{", r"data\.json is not JSON: .*line 1"),
        ("data.json", '{"id": 1}', r"data\.json holds an object, but a \.json file must hold a list.*use \.jsonl"),
        ("data.json", "[]", r"data\.json holds no conversation"),
        ("data.jsonl", "\n", r"data\.jsonl holds no conversation"),
        ("data.jsonl", "\n{oops", r"data\.jsonl: every one of its 1 samples is left out.*line 2 is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, text, name)


def test_lines_are_samples_too(tmp_path: Path) -> None:
    text = "\n".join([json.dumps(GOOD), "", json.dumps(entry(HUMAN, GPT))])
    with load(tmp_path, text, "data.jsonl", seq_len=24) as loader:
        assert loader.num_samples == 2 and len(list(loader.one_pass())) == 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    corpus.write_tokenizer(tmp_path, 1)
    with pytest.raises(DataError, match=r"DataConfig\.path='.*data\.json': No such file.*; name a file"):
        Loader(DataConfig(str(path), **SHAPE))
    path.write_bytes(b"\xff\xfe[\0]")
    with pytest.raises(DataError, match=r"data\.json is not text in utf-16: .*; save it as UTF-8"):
        Loader(DataConfig(str(path), **SHAPE))
    path.write_text(json.dumps([GOOD]))
    with pytest.raises(DataError, match=r"no tokenizer at .*gone; set DataConfig\.tokenizer"):
        Loader(DataConfig(str(path), **SHAPE, tokenizer=str(tmp_path / "gone")))
    with pytest.raises(DataError, match=r"data\.json is not a Hugging Face tokenizer\.json"):
        Loader(DataConfig(str(path), **SHAPE, tokenizer=str(path)))
    with pytest.raises(DataError, match=r"Template\.end_token='</s>' is no token of .*tokenizer\.json; name the one"):
        Loader(DataConfig(str(path), **SHAPE, template=Template(end_token="</s>")))


def test_no_token_hides_a_placeholder(tmp_path: Path) -> None:
    tokenizer = corpus.write_tokenizer(tmp_path, 1)
    tokenizer.add_special_tokens(["<image>s"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    hidden = entry({"from": "human", "value": "<image>s q0"}, GPT, image="a.png")
    (tmp_path / "data.json").write_text(json.dumps([GOOD, hidden]))
    with Loader(DataConfig(str(tmp_path / "data.json"), **SHAPE), [VISION]) as loader:
        _, (batch, _) = loader.one_pass()
        assert (batch["vision.index"] >= 0).sum() == 4 and not loader.bad


def test_another_spelling_of_a_placeholder_is_named(tmp_path: Path) -> None:
    tokenizer = corpus.write_tokenizer(tmp_path, 1)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<image>", normalized=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    odd = entry({"from": "human", "value": "<image> <IMAGE> q0"}, GPT, image="a.png")
    (tmp_path / "data.json").write_text(json.dumps([GOOD, odd]))
    with Loader(DataConfig(str(tmp_path / "data.json"), **SHAPE), [VISION]) as loader:
        assert len(list(loader.one_pass())) == 1
        assert "its text spells <image>, which the tokenizer cannot write as text" in str(loader.bad[0])


def test_a_sample_that_no_group_can_hold_is_an_error_at_once(tmp_path: Path) -> None:
    sample = entry({"from": "human", "value": "<image>" * 5}, GPT, image=["vision-0-0.png"] * 5)
    with pytest.raises(DataError, match=r"'odd' .* has 5 pictures for vision, but slots_per_group=4.*raise .* to 5"):
        load(tmp_path, json.dumps([GOOD, sample]))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([entry(GPT)] * 3, r"every one of its 3 samples is left out, 3 as bad and 0 as longer.*it has no question"),
        ([entry(HUMAN, GPT, image="gone.png")] * 2, r"every one of its 2 samples is left out, 2 as bad.*no such file"),
        ([entry({"from": "human", "value": "q0 " * 40}, GPT, image=None)], r"0 as bad and 1 as longer than seq_len=16"),
    ],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_data_set_without_a_usable_sample_ends_instead_of_spinning(
    tmp_path: Path, samples: list[Any], message: str, prefetch: int
) -> None:
    def both_ways() -> None:
        with load(tmp_path, json.dumps(samples), prefetch=prefetch) as loader:
            with pytest.raises(DataError, match=message):
                next(loader.one_pass())
            loader.next_step(1)

    with pytest.raises(DataError, match=message):
        both_ways()


def test_a_failure_comes_with_the_step_that_meets_it_and_stays(tmp_path: Path) -> None:
    samples = [GOOD] * 5 + [entry(HUMAN, GPT, image="gone.png")]
    settings = dict(on_bad_item="stop", shuffle=False, prefetch=4)
    with load(tmp_path, json.dumps(samples), **settings) as loader:
        for _ in range(5):
            loader.next_step(1)
        state = loader.state()
        for _ in range(2):
            with pytest.raises(DataError, match="no such file"):
                loader.next_step(1)
        assert loader.state() == state


def test_a_position_of_another_order_is_refused(tmp_path: Path) -> None:
    state = load(tmp_path, json.dumps([GOOD])).state()
    for settings, text in ((dict(seed=1), [GOOD]), (dict(shuffle=False), [GOOD]), ({}, [GOOD, GOOD])):
        other = load(tmp_path, json.dumps(text), **settings)
        with pytest.raises(DataError, match=r"the saved data position has \w+=.* this run .*resume with the same file"):
            other.restore(state)


def settings(**changed: Any) -> Callable[[], object]:
    return lambda: DataConfig(**(dict(path="x.json", **SHAPE) | changed))


def item(**changed: Any) -> Callable[[], object]:
    return lambda: ItemSpec(**(dict(name="v", rows=4, reader=PICTURES) | changed))


def pair(**changed: Any) -> Callable[[], object]:
    second = dict(name="w", rows=4, reader=PICTURES, field="f", placeholder="<f>") | changed
    return lambda: check_items(DataConfig("x.json", **SHAPE), [VISION, ItemSpec(**second)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (settings(path="x.txt"), r"DataConfig\.path='x\.txt'; it must name a \.json or \.jsonl"),
        (settings(seq_len=1), r"DataConfig\.seq_len=1; it must be at least 2"),
        (settings(samples_per_group=0), r"DataConfig\.samples_per_group=0; it must be at least 1"),
        (settings(groups=0), r"DataConfig\.groups=0"),
        (settings(seed=-1), r"DataConfig\.seed=-1; it must be at least 0"),
        (settings(lookahead=0), r"DataConfig\.lookahead=0"),
        (settings(workers=0), r"DataConfig\.workers=0"),
        (settings(prefetch=-1), r"DataConfig\.prefetch=-1"),
        (settings(on_bad_item="ignore"), r"DataConfig\.on_bad_item='ignore'; it must be one of skip, stop"),
        (settings(on_long="wrap"), r"DataConfig\.on_long='wrap'; it must be one of truncate, skip"),
        (lambda: Template(end_token=""), r"Template\.end_token is empty"),
        (item(rows=0), r"v: rows=0; it must be at least 1"),
        (item(slots_per_group=0), r"v: slots_per_group=0"),
        (item(field=""), r"v: field is empty"),
        (lambda: Pictures(8, 8, mean=(0.5,)), r"mean=\(0\.5,\); give one number"),
        (lambda: Pictures(8, 8, std=(0.5, 0.0, 0.5)), r"std=.*each must be above 0"),
        (pair(name="vision"), r"name 'vision' is used by 2 encoders"),
        (pair(field="image"), r"field 'image' is used by 2 encoders"),
        (pair(placeholder="<image>"), r"placeholder '<image>' is used by 2 encoders"),
        (pair(placeholder="<image>2"), r"vision: placeholder '<image>' is part of w's '<image>2'"),
        (
            pair(rows=15),
            r"DataConfig\.seq_len=16 is too short: one picture of w takes up to 15 pos.* at least 17",
        ),
        (
            lambda: check_items(DataConfig("x.json", **SHAPE, template=Template(human_prefix="<plot>")), [CHART]),
            r"Template\.human_prefix='<plot>' contains chart's placeholder",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_rule(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_needs_a_microbatch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_microbatches=0; a step needs at least 1"):
        load(tmp_path, json.dumps([GOOD])).next_step(0)
