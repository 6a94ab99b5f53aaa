"""Data as people have them: each odd entry is trained on as it is meant, or is a bad sample by name, and never an
exception; what stands beside it is trained on in any case, and a resumed run repeats the steps behind it.

`«...»` is a special token in the ids, `#` a picture; every other character is a token of its own.
"""

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hetjax.data import DataConfig, DataError, ItemSpec, Loader, Pictures, Sounds, Template
from hetjax.data.items import Item
from hetjax.data.problems import name_of
from hetjax.data.problems import shown as shown_value
from hetjax.generate.chat import RunChat
from hetjax.generate.prompt import read_prompts

VISION = ItemSpec("vision", 2, Pictures(height=4, width=4), slots_per_group=3)
CHATML = Template(
    human_prefix="<|im_start|>user\n",
    human_suffix="<|im_end|>\n<|im_start|>assistant\n",
    end_token="<|im_end|>",
    answer_suffix="\n",
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>", "<image>")
ASK, SAY = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
SEE = {"from": "human", "value": "<image>\nhi"}
HALF = "\ud83d"  # of an emoji
LONGEST = 300  # characters of a line that names a bad sample


class Trained(NamedTuple):
    """The sample is trained on: all of its text, and each answer."""

    text: str
    answers: tuple[str, ...] = ("yes",)


class Bad(NamedTuple):
    """The sample is left out, or keeps its place without weight."""

    reason: str
    masked: bool = False


def chat(*turns: str) -> str:
    """Question, answer, question, ... in ChatML."""
    shown = [f"«<|im_start|>»{('user', 'assistant')[n % 2]}\n{turn}«<|im_end|>»" for n, turn in enumerate(turns)]
    return "\n".join(shown)


def talk(*turns: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "odd", "conversations": list(turns or (ASK, SAY))} | fields


def said(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def asked(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def parts(*content: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "odd", "messages": [{"role": "user", "content": list(content)}, ROLE_SAY]} | fields


ROLE_ASK, ROLE_SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be brief"}
TEXT = {"type": "text", "text": "hi"}
PLAIN, SEEN = Trained(chat("hi", "yes")), Trained(chat("#\nhi", "yes"))
BRIEF = Trained("be brief\n" + chat("hi", "yes"))

ENTRIES: dict[str, tuple[Any, Trained | Bad]] = {
    "half an emoji in an answer": (talk(ASK, said(f"ok {HALF}")), Bad("turn 1 holds half a character")),
    "half an emoji in a question": (talk(asked(HALF), SAY), Bad("turn 0 holds half a character")),
    "half an emoji in a file name": (talk(SEE, SAY, image=f"{HALF}.png"), Bad("image.*half a character")),
    "half an emoji in the id": (talk(id=HALF), PLAIN),
    "half an emoji in a field that nobody reads": (talk(source=HALF), PLAIN),
    "a null character in a text": (talk(ASK, said("a\0b")), Trained(chat("hi", "a\0b"), ("a\0b",))),
    "NaN for a text": (talk(ASK, said(float("nan"))), Bad("turn 1 .*nan")),  # type: ignore[arg-type]
    "null for a text": (talk(asked(None), SAY), Bad("turn 0 .*None")),  # type: ignore[arg-type]
    "a number for a text": (talk(ASK, said(5)), Bad("turn 1 .*5")),  # type: ignore[arg-type]
    "infinity for the id": (talk(id=float("inf")), PLAIN),
    "a list for the id": (talk(id=["a", ["b"]]), PLAIN),
    "an id of many lines": (talk(id="a\n" * 5000, conversations=[]), Bad("no conversations")),
    "no id": ({"conversations": [ASK, SAY]}, PLAIN),
    "the id of another": (talk(id="first"), PLAIN),
    "a long number": (talk(source=int("9" * 4000)), PLAIN),
    "a list of lists": (talk([ASK, SAY]), Bad("turn 0")),
    "an object for the turns": (talk(conversations={"human": "hi"}), Bad("no conversations")),
    "a text for the entry": ("hi", Bad("it is a text")),
    "null for the entry": (None, Bad("it is null")),
    "a turn that is null": (talk(ASK, None), Bad("turn 1")),
    "no turn": (talk(conversations=[]), Bad("no conversations")),
    "a long wrong turn": (talk({"from": "human", "val": "x" * 99999}), Bad("turn 0")),
    "an absolute path": (talk(SEE, SAY, image="DIR/0.png"), SEEN),
    "a path at home": (talk(SEE, SAY, image="~/0.png"), SEEN),
    "a file address": (talk(SEE, SAY, image="file://DIR/a%20b.png"), SEEN),
    "a name with odd characters": (talk(SEE, SAY, image="#1 (a)[b]@%20'ü\n.png"), SEEN),
    "a web address": (talk(SEE, SAY, image="https://host/0.png"), Bad("web address")),
    "a picture inside of the entry": (
        talk(SEE, SAY, image="data:image/png;base64," + "A" * 99999),
        Bad("image.*data:"),
    ),
    "a null character in a name": (talk(SEE, SAY, image="a\0.png"), Bad("no such file|cannot be read")),
    "a name of many characters": (talk(SEE, SAY, image="a" * 9999), Bad("no such file|cannot be read")),
    "a list in a list of names": (talk(SEE, SAY, image=[["0.png"]]), Bad("image=.*; it must be a file name or a list")),
    "an object for a name": (talk(SEE, SAY, image={"byte": "x"}), Bad("image=.*; it must be a file name or a list")),
    "an empty name": (talk(image=""), PLAIN),
    "an empty name with a placeholder": (talk(SEE, SAY, image=""), Bad("1 <image>, image names 0 files")),
    "a folder for a picture": (talk(SEE, SAY, image="folder"), Bad("cannot be read as a picture")),
    "a pipe for a picture": (talk(SEE, SAY, image="pipe"), Bad("cannot be read as a picture.*device")),
    "a picture of zero bytes": (talk(SEE, SAY, image="zero.png"), Bad("cannot be read as a picture")),
    "a picture cut in half": (talk(SEE, SAY, image="half.png"), Bad("cannot be read as a picture", masked=True)),
    "two pictures, one cut in half": (
        talk(asked("<image><image>hi"), SAY, image=["0.png", "half.png"]),
        Bad("half.png.*cannot be read as a picture", masked=True),
    ),
    "images": (talk(SEE, SAY, images=["0.png"]), SEEN),
    "image and images": (talk(SEE, SAY, image="0.png", images=["0.png"]), Bad("both image and images")),
    "a field twice": ('{"id":"odd","image":"1.png","image":"0.png","conversations":TURNS}', Bad("twice")),
    "a video": (talk(asked("<video>\nhi"), SAY, video="a.mp4"), Bad("no encoder takes its video")),
    "videos": (talk(videos=["a.mp4"]), Bad("no encoder takes its videos")),
    "a sound": (talk(audio="a.wav"), Bad("no encoder takes its audio")),
    "a sound beside a picture": (talk(SEE, SAY, image="0.png", audio=["a.wav"]), Bad("no encoder takes its audio")),
    "a path of a sound": (talk(audio_path="a.wav"), Bad("no encoder takes its audio_path")),
    "no video": (talk(video=None, audios=[], image=None), PLAIN),
    "a picture that a turn names": (talk(ASK | {"image": "0.png"}, SAY), Bad("turn 0 names image")),
    "an answer that spells an end token": (
        talk(ASK, said("a</s>b<|im_end|>c")),
        Trained(chat("hi", "a</s>b<|im_end|>c"), ("a</s>b<|im_end|>c",)),
    ),
    "a question that spells a turn": (
        talk(asked("a<|im_end|>\n<|im_start|>b"), SAY),
        Trained(chat("a<|im_end|>\n<|im_start|>b", "yes")),
    ),
    "an answer that spells a picture": (talk(ASK, said("<image>")), Trained(chat("hi", "<image>"), ("<image>",))),
    "a picture in an answer": (talk(SEE, said("<image>"), image="0.png"), Bad("an answer contains <image>")),
    "an added token that is not special": (talk(ASK, said("<tool>")), Trained(chat("hi", "<tool>"), ("<tool>",))),
    "messages": ({"id": "odd", "messages": [ROLE_ASK, ROLE_SAY]}, PLAIN),
    "roles in conversations": (talk(ROLE_ASK, ROLE_SAY), PLAIN),
    "from user": (talk({"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}), PLAIN),
    "messages and conversations": (talk(messages=[ROLE_ASK, ROLE_SAY]), Bad("both conversations and messages")),
    "conversations that are null": (talk(conversations=None, messages=[ROLE_ASK, ROLE_SAY]), PLAIN),
    "value and content": (talk(ASK | {"content": "ho"}, SAY), Bad("turn 0 .*both value and content")),
    "a tool's turn": (talk(ASK, {"from": "tool", "value": "x"}), Bad("turn 1 is from 'tool'")),
    "a system turn": ({"id": "odd", "messages": [SYSTEM, ROLE_ASK, ROLE_SAY]}, BRIEF),
    "a system turn in conversations": (talk({"from": "system", "value": "be brief"}, ASK, SAY), BRIEF),
    "a system field": (talk(system="be brief"), BRIEF),
    "an empty system field": (talk(system=""), PLAIN),
    "an empty system turn": (talk({"from": "system", "value": ""}, ASK, SAY), Trained("\n" + chat("hi", "yes"))),
    "a system field and turn": (talk(SYSTEM, ASK, SAY, system="x"), Bad("system")),
    "a system turn behind": (talk(ASK, SAY, SYSTEM, ASK, SAY), Bad("turn 2 .*system")),
    "a system turn that spells a token": (
        talk(SYSTEM | {"content": "no </s>"}, ASK, SAY),
        Trained("no </s>\n" + chat("hi", "yes")),
    ),
    "a system turn alone": (talk(SYSTEM), Bad("no question")),
    "gpt first": (talk(said("hello"), ASK, SAY), PLAIN),
    "gpt first behind a system turn": (talk(SYSTEM, said("hello"), ASK, SAY), BRIEF),
    "gpt alone": (talk(SAY), Bad("no question")),
    "human last": (talk(ASK, SAY, ASK), Bad("ends on human")),
    "two turns of one": (talk(ASK, ASK, SAY), Bad("turn 1 is from human")),
    "parts of text": (parts(TEXT), PLAIN),
    "a part names a picture": (parts({"type": "image", "image": "0.png"}, TEXT), SEEN),
    "a part has an address": (parts({"type": "image_url", "image_url": {"url": "0.png"}}, TEXT), SEEN),
    "a part is a picture": (parts({"type": "image"}, TEXT, images=["0.png"]), SEEN),
    "a part behind a text": (
        parts(TEXT, {"type": "image", "path": "0.png"}),
        Trained(chat("hi#\n", "yes")),
    ),
    "parts and a field": (parts({"type": "image", "image": "0.png"}, TEXT, image="1.png"), Bad("both")),
    "a part is a video": (parts({"type": "video", "video": "a.mp4"}, TEXT), Bad("turn 0.*video")),
    "a part of text that names a picture": (parts(TEXT | {"image": "0.png"}), Bad("turn 0 names image")),
    "a picture that names a video": (
        parts({"type": "image", "image": "0.png", "video": "a.mp4"}, TEXT),
        Bad("turn 0 names video"),
    ),
    "parts as tables have them": (
        parts({"type": "image", "image": "0.png", "text": None}, TEXT | {"image": None}),
        SEEN,
    ),
    "roles in capitals": (talk({"from": "User", "value": "hi"}, {"from": "GPT", "value": "yes"}), PLAIN),
    "a part without a type": (parts({"text": "hi"}), Bad("turn 0")),
    "a part is a text": (parts("hi"), Bad("turn 0")),
    "no placeholder": (talk(image="0.png"), SEEN),
    "fewer placeholders": (talk(SEE, SAY, image=["0.png", "1.png"]), Trained(chat("#\n#\nhi", "yes"))),
    "the placeholder of a later turn": (
        talk(ASK, SAY, SEE, SAY, image=["0.png", "1.png"]),
        Trained(chat("#\nhi", "yes", "#\nhi", "yes"), ("yes", "yes")),
    ),
    "more placeholders": (talk(SEE, SAY), Bad("1 <image>, image names 0 files")),
    "answers of usual weight": (
        talk(ASK | {"train": False}, SAY | {"weight": 1, "loss": True, "mask": False}, weight=1.0, label=True),
        PLAIN,
    ),
    "preference data": (talk(rejected_response="no"), Bad("it has rejected_response beside its turns")),
    "a rejected conversation": (talk(chosen=None, rejected=[ASK, SAY]), Bad("it has rejected beside its turns")),
    "an instruction": (talk(instruction="be brief"), Bad("it has instruction beside its turns")),
    "an empty instruction": (talk(instruction=""), PLAIN),
    "what is wrong": (talk(label=False), Bad("it has label=False, but every sample is trained on alike")),
    "a class": (talk(label="cat", score_rejected=0.5), PLAIN),
    "a weight of the entry": (talk(weight=0.5), Bad("it has weight=0.5, but every sample is trained on alike")),
    "harmless keys": (
        talk(
            ASK | {"id": 1, "name": "Ann", "timestamp": 2.5},
            SAY | {"lang": "en"},
            id="0.png",
            source="https://host/0.png",
            meta={"lang": "en", "license": "a.jpg", "title": "0.png"},
            image_id="0001",
            imageSize=[8, 8],
            image_caption="a dog",
            prompt="what is 0.png",
            frame_index=[1, 2],
            num_images=0,
            has_image=True,
            framework="jax",
            url="https://host/page",
            path="train/part-0",
        ),
        PLAIN,
    ),
    "a file under a key within another": (talk(meta={"a": [{"image": "0"}]}), Bad("takes its meta.a.image='0'")),
    "a key that a turn has within another": (
        talk(ASK | {"meta": {"imagePath": "0.png"}}, SAY),
        Bad("turn 0 names meta.imagePath"),
    ),
    "a picture's bytes under another key": (talk(content_of="data:image/png;base64,AA"), Bad("takes its content_of")),
    "an object with a path": (talk(SEE, SAY, image={"path": "0.png", "bytes": None}), SEEN),
    "objects with a path": (talk(SEE, SAY, images=[{"path": "0.png"}]), SEEN),
    "an object with a picture": (talk(SEE, SAY, image={"path": None, "bytes": "x" * 99}), Bad("file lies inside")),
    "a part with a picture": (parts({"type": "image", "data": "AAAA"}, TEXT, image="0.png"), Bad("file lies inside")),
    "a part with a source": (
        parts({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}, TEXT),
        Bad("file lies inside"),
    ),
    "a system prompt": (talk(system_prompt="be brief"), BRIEF),
    "a system prompt beside a system": (talk(system_prompt="x", system="y"), Bad("both system and system_prompt")),
    "a picture in a system turn": (
        talk({"from": "system", "value": "<image>"}, ASK, SAY, image="0.png"),
        Bad("its system text contains <image>; it may stand in questions only"),
    ),
    "a picture in a system field": (talk(system="<image>"), Bad("its system text contains <image>")),
    "a video in a system turn": (talk(SYSTEM | {"content": "<video>"}, ASK, SAY), Bad("its system text has <video>")),
    "an answer that spells a video": (
        talk(ASK, said("<video> <img>a</img>")),
        Trained(chat("hi", "<video> <img>a</img>"), ("<video> <img>a</img>",)),
    ),
    "a question with tags": (
        talk(asked('<b> <img src="a"> <image/> [image]'), SAY),
        Trained(chat('<b> <img src="a"> <image/> [image]', "yes")),
    ),
    "a placeholder under another key": (talk(SEE, SAY, image_path="0.png"), Bad("no encoder takes its image_path")),
    "a conversation": ({"id": "odd", "conversation": [ASK, SAY]}, PLAIN),
    "instruction and output": ({"instruction": "a", "output": "b"}, Bad('"value": instruction.*"value": output')),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, Bad('"value": prompt.*"value": completion')),
    "a path that nests deeply": (
        '{"id":"odd","image":' + '{"path":' * 900 + "1" + "}" * 900 + ',"conversations":TURNS}',
        Bad("image=.*; it must be a file name"),
    ),
    "a key that nests deeply": ('{"conversations":TURNS,"a":' + "[" * 900 + "]" * 900 + "}", PLAIN),
}
NAMING = (
    "Image audio_filepath file_name image_name image_names imagePath image-path image_dir image_src image_uri img_src "
    "image0 image1 image_1 imageURL image_list image_base64 image_bytes audio_name video_name picture_name photo_id "
    "media media_path clip mp3 vision pixel_values frames depth file files path url"
)
WEIGHTS = [{"weight": 0}, {"weight": 0.5}, {"loss": False}, {"train": False}, {"training": False}, {"mask": True}]


@pytest.mark.parametrize("key", NAMING.split())
@pytest.mark.parametrize("listed", [False, True])
def test_a_file_under_any_key_is_used_or_its_sample_bad_by_name(
    key: str, listed: bool, directory: Path, tmp_path: Path
) -> None:
    path = entries_file(directory, talk(**{key: ["0.png"] if listed else "0.png"}), tmp_path / "data.json")
    check(loader(directory, path), Bad(f"no encoder takes its {key}=.*; those of the run read image, images"))


@pytest.mark.parametrize("items", [(VISION,), ()], ids=["seeing", "blind"])
@pytest.mark.parametrize(
    "spelled",
    ["<video>", "<audio>", "<speech>", "<image_1>", "<image1>", "<image 1>", "<|image_1|>", "<img>DIR/0.png</img>"],
)
def test_a_question_s_placeholder_that_no_encoder_takes_makes_its_sample_bad(
    spelled: str, items: tuple[ItemSpec, ...], directory: Path, tmp_path: Path
) -> None:
    path = entries_file(directory, talk(asked(f"{spelled}\nhi"), SAY), tmp_path / "data.json")
    shown = re.escape(spelled[:5]) + ".*"
    take = "those of the run take <image>" if items else "give the run one"
    check(loader(directory, path, items), Bad(f"turn 0 has {shown}, which no encoder takes; {take}"))


def test_a_placeholder_in_a_run_of_text_alone_makes_its_sample_bad(directory: Path, tmp_path: Path) -> None:
    check(loader(directory, entries_file(directory, talk(SEE, SAY), tmp_path / "data.json"), ()), Bad("has <image>"))


@pytest.mark.parametrize("role", ["model", "chatgpt", "bing", "bard"])
def test_other_names_of_the_assistant(role: str, directory: Path, tmp_path: Path) -> None:
    path = entries_file(directory, talk(ASK, SAY | {"from": role}), tmp_path / "data.json")
    check(loader(directory, path), PLAIN)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_an_answer_that_shall_not_be_trained_on_is_not(weight: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    (key,) = weight
    path = entries_file(directory, talk(ASK, SAY, ASK, SAY | weight), tmp_path / "data.json")
    check(loader(directory, path), Bad(f"an answer has {key}=.*; take the sample out"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, broken ones too, and the tokenizer: one token a byte."""
    directory = tmp_path_factory.mktemp("wild")
    for name in ("0.png", "1.png", "a b.png", "#1 (a)[b]@%20'ü\n.png"):
        Image.new("RGB", (8, 8), (200, 100, 50)).save(directory / name)
    Image.effect_noise((64, 64), 50).save(directory / "half.png")
    content = (directory / "half.png").read_bytes()
    (directory / "half.png").write_bytes(content[: len(content) // 2])
    (directory / "zero.png").touch()
    (directory / "folder").mkdir()
    os.mkfifo(directory / "pipe")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def loader(directory: Path, path: Path, items: tuple[ItemSpec, ...] = (VISION,), **settings: Any) -> Loader:
    shape = dict(seq_len=160, samples_per_group=1, shuffle=False, workers=1, prefetch=0, template=CHATML)
    files = dict(media_root=str(directory), tokenizer=str(directory / "tokenizer.json"))
    return Loader(DataConfig(str(path), **(shape | files | settings)), items)


def read(batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> Trained:
    """What a row holds."""
    used = int((batch["segment_ids"][0] > 0).sum())
    index = batch["vision.index"][0] if "vision.index" in batch else np.full(used, -1)
    ids = [*batch["tokens"][0, :used].tolist(), int(batch["targets"][0, used - 1])]
    pieces = [shown(tokenizer, t) for t in ids]
    for place in np.flatnonzero(index[:used] >= 0):
        pieces[place] = b"#" if index[place] % VISION.rows == 0 else b""
    weights = batch["weights"][0, :used] > 0
    answers = b"".join(shown(tokenizer, int(t)) for t in batch["targets"][0, :used][weights]).decode()
    return Trained(b"".join(pieces).decode(), tuple(answers.split("«<|im_end|>»")[:-1]))


def shown(tokenizer: Tokenizer, token: int) -> bytes:
    text = tokenizer.id_to_token(token)
    if text in SPECIAL:
        return f"«{text}»".encode()
    return text.encode() if text == "<tool>" else tokenizer.decode([token]).encode() if ord(text) < 127 else raw(text)


def raw(letter: str) -> bytes:
    """The byte that a letter of a byte-level alphabet stands for."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return bytes([ord(letter) if ord(letter) < 256 else hidden[ord(letter) - 256]])


def check(loader: Loader, right: Trained | Bad) -> None:
    """Between a first and a last good sample, in the file's order."""
    with loader:
        found = [read(batch, loader.tokenizer) for batch, _ in loader.one_pass()]
        if isinstance(right, Trained):
            assert (found, loader.bad) == ([PLAIN, right, PLAIN], [])
            return
        (problem,) = loader.bad
        line = str(problem)
        assert line.isprintable() and len(line) <= LONGEST and re.search(right.reason, line)
        assert len(found) == 2 + right.masked and found[0] == found[-1] == PLAIN
        assert not right.masked or (found[1].answers == () and "«" in found[1].text)


def entries_file(directory: Path, odd: Any, path: Path) -> Path:
    """A .json file with the odd entry between two good ones."""
    turns = json.dumps([ASK, SAY])
    text = odd.replace("TURNS", turns) if isinstance(odd, str) and odd[0] == "{" else json.dumps(odd)
    first, last = (json.dumps(talk(id=name)) for name in ("first", "last"))
    path.write_text(f"[{first}, {text.replace('DIR', str(directory))}, {last}]")
    return path


@pytest.mark.parametrize("case", list(ENTRIES))
def test_an_odd_entry_is_used_as_meant_or_bad_by_name(
    case: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(directory))
    odd, right = ENTRIES[case]
    path = entries_file(directory, odd, tmp_path / "data.json")
    check(loader(directory, path), right)
    steps, states = [], []
    with loader(directory, path) as first:
        for _ in range(4):
            states.append(json.dumps(first.state()))
            steps += first.next_step(1)
    for start, state in enumerate(states):
        with loader(directory, path) as resumed:
            resumed.restore(json.loads(state))
            for step in steps[start:]:
                (again,) = resumed.next_step(1)
                assert all(np.array_equal(again[name], step[name]) for name in step)


def test_a_picture_of_several_frames_is_counted_as_cut(directory: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(3)]
    for name in ("a.gif", "a.webp", "a.tiff", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.gif")
    entries = [talk(image=str(tmp_path / name)) for name in ("a.gif", "one.gif", "a.webp", "a.tiff", "a.png")]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with loader(directory, tmp_path / "a.json") as seen:
        assert len(list(seen.one_pass())) == 5 and not seen.bad
        assert seen.tally.cut_items == {0, 2, 3, 4}


def test_what_is_nested_deeply_has_a_name() -> None:
    deep: list[Any] = []
    for _ in range(9999):
        deep = [deep]
    assert "..." in name_of({"id": deep}, 0) and "..." in shown_value(deep)


@pytest.mark.parametrize("field", ["image", "images", "video", "audio", "audios", "image_path", "speech"])
def test_a_run_of_text_alone_does_not_train_on_what_names_a_file(field: str, directory: Path, tmp_path: Path) -> None:
    path = entries_file(directory, talk(**{field: "0.png"}), tmp_path / "data.json")
    check(loader(directory, path, ()), Bad(f"no encoder takes its {field}"))


SOUNDS: dict[str, Trained | Bad] = {
    "a.wav": Trained(chat("#\nhi", "yes")),
    "short.wav": Bad("too few for one row"),
    "zero.png": Bad("cannot be read as a sound"),
    "0.png": Bad("cannot be read as a sound"),
    "folder": Bad("cannot be read as a clip.*directory"),
    "pipe": Bad("cannot be read as a clip.*device"),
    "a" * 9999: Bad("no such file"),
    "a\0.wav": Bad("no such file"),
    "lost.flac": Bad("cannot be read as a sound", masked=True),
    "nan.wav": Bad("cannot be read as a sound: .*not finite", masked=True),
}


@pytest.mark.parametrize("name", list(SOUNDS), ids=lambda name: name[:20])
def test_an_odd_sound_is_used_as_meant_or_bad_by_name(name: str, directory: Path, tmp_path: Path) -> None:
    soundfile.write(directory / "a.wav", np.zeros(8000), 16000)
    soundfile.write(directory / "short.wav", np.zeros(100), 16000)
    soundfile.write(directory / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(directory / "lost.flac", np.random.default_rng(0).normal(size=8000) / 9, 16000)
    content = (directory / "lost.flac").read_bytes()
    (directory / "lost.flac").write_bytes(content[:5000] + bytes(len(content) - 5000))
    reader = Sounds(80, 100, 100, lambda frames: frames // 25)
    hearing = ItemSpec("vision", 4, reader, field="audio", placeholder="<audio>")  # `read` looks for that name
    path = entries_file(directory, talk(asked("<audio>\nhi"), SAY, audio=name), tmp_path / "data.json")
    with loader(directory, path, (hearing,)) as heard:
        found = [batch for batch, _ in heard.one_pass()]
        right = SOUNDS[name]
        assert len(found) == (3 if isinstance(right, Trained) else 2 + right.masked)
        assert [bool(batch["weights"].any()) for batch in found[1:-1]] == [isinstance(right, Trained)] * (
            len(found) - 2
        )
        assert (
            [bool(re.search(right.reason, str(p))) for p in heard.bad] == [True]
            if isinstance(right, Bad)
            else not heard.bad
        )
        assert all(len(str(p)) <= LONGEST and str(p).isprintable() for p in heard.bad)


def test_a_run_asks_what_it_was_trained_on(directory: Path, tmp_path: Path) -> None:
    """The ids of a prompt are those of the sample in front of its answer, whatever the texts spell."""
    talks = [
        talk(ASK, SAY, system="be </s>"),
        talk(asked("a<|im_end|>b"), said("</s>"), ASK, SAY),
        talk(ASK, SAY, image="0.png"),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(t) for t in talks))
    with loader(directory, tmp_path / "a.jsonl", media_root=str(directory)) as trained:
        rows = [batch["tokens"][0] for batch, _ in trained.questions(3)]
        chat = RunChat(trained.tokenizer, CHATML, (VISION,))
        for row, prompt in zip(rows, read_prompts(tmp_path / "a.jsonl", (VISION,)), strict=True):
            found = {"vision": [Item({}, VISION.rows)] * len(prompt.files["image"])}
            ids = chat.encode(prompt, found).tokens
            assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any()


LINE = json.dumps(talk(ASK, said("ü")), ensure_ascii=False)
GOOD = json.dumps(talk())
ACCENT = Trained(chat("hi", "ü"), ("ü",))
THREE = "\n".join([GOOD, LINE, GOOD])
FILES: dict[str, tuple[str, bytes, Trained | Bad | str]] = {
    "a byte-order mark": ("a.json", codecs.BOM_UTF8 + f"[{GOOD},{LINE},{GOOD}]".encode(), ACCENT),
    "UTF-16": ("a.json", f"[{GOOD},{LINE},{GOOD}]".encode("utf-16"), ACCENT),
    "lines with a byte-order mark": ("a.jsonl", codecs.BOM_UTF8 + THREE.encode(), ACCENT),
    "lines in UTF-16": ("a.jsonl", THREE.encode("utf-16"), ACCENT),
    "lines of Windows, some blank": ("a.jsonl", f"{GOOD}\r\n\r\n{LINE}\r\n \r\n{GOOD}\r\n".encode(), ACCENT),
    "a byte-order mark amid the lines": ("a.jsonl", f"{GOOD}\n\ufeff{LINE}\n{GOOD}".encode(), ACCENT),
    "a line's separator in a text": (
        "a.jsonl",
        f"{GOOD}\n{LINE.replace('ü', chr(0x2028))}\n{GOOD}".encode(),
        Trained(chat("hi", "\u2028"), ("\u2028",)),
    ),
    "bytes that are no text": ("a.json", f"[{GOOD},{LINE},{GOOD}]".encode("latin-1"), Bad("turn 1 holds")),
    "bytes in a line that are no text": ("a.jsonl", THREE.encode("latin-1"), Bad("turn 1 holds")),
    "a line that is no JSON": ("a.jsonl", f"{GOOD}\n{{oops\n{GOOD}".encode(), Bad("line 2 is not JSON")),
    "a comma behind a line": ("a.jsonl", f"{GOOD}\n{LINE},\n{GOOD}".encode(), Bad("line 2 is not JSON")),
    "brackets without end": ("a.jsonl", f"{GOOD}\n{'[' * 99999}\n{GOOD}".encode(), Bad("line 2 is not JSON")),
    "a number without end": (
        "a.json",
        f'[{GOOD},{{"conversations": 1{"0" * 9999}}},{GOOD}]'.encode(),
        Bad("no conversations"),
    ),
    "brackets without end in a list": ("a.json", f"[{GOOD}, {'[' * 99999}".encode(), r"a\.json is not JSON"),
    "a list cut short": ("a.json", f"[{GOOD}, {LINE[:9]}".encode(), r"a\.json is not JSON"),
    "a comma at a list's end": ("a.json", f"[{GOOD},]".encode(), r"a\.json is not JSON: .* or a comma at its end$"),
    "a comment": ("a.json", f"[{GOOD} // one".encode(), r"a\.json is not JSON: .*without comments or a comma"),
    "a list within an object": ("a.json", f'{{"data": [{GOOD}]}}'.encode(), "an object, .*one under 'data' is it"),
    "one conversation": ("a.json", GOOD.encode(), r"holds an object, .*use \.jsonl"),
    "a list that is called lines": ("a.jsonl", f"[\n{GOOD},\n{GOOD}\n]\n".encode(), r"one list.*call it \.json"),
    "a list on a line": ("a.jsonl", f"\ufeff[{GOOD}, {GOOD}]".encode(), r"holds one list.*call it \.json"),
    "lines that are called a list": ("a.json", THREE.encode(), r"a\.json is not JSON: .*\.jsonl"),
    "no bytes": ("a.json", b"", r"a\.json is not JSON"),
    "no lines": ("a.jsonl", b"", r"a\.jsonl holds no conversation"),
    "a picture that is called a list": ("a.json", b"\x89PNG\r\n\x1a\n\0\0", r"a\.json is not (JSON|text)"),
}


@pytest.mark.parametrize("case", list(FILES))
def test_a_file_of_any_encoding_is_read_or_refused_by_name(case: str, directory: Path, tmp_path: Path) -> None:
    name, content, right = FILES[case]
    (tmp_path / name).write_bytes(content)
    if isinstance(right, str):
        with pytest.raises(DataError, match=right):
            loader(directory, tmp_path / name)
    else:
        check(loader(directory, tmp_path / name), right)


def test_a_last_line_that_is_cut_off_is_a_bad_sample(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{GOOD}\n{LINE[:20]}")
    with loader(directory, tmp_path / "a.jsonl") as cut:
        assert [read(b, cut.tokenizer) for b, _ in cut.one_pass()] == [PLAIN, PLAIN]
        assert "line 3 is not JSON" in str(cut.bad[0])


def test_the_path_is_what_a_run_complains_about_first(directory: Path, tmp_path: Path) -> None:
    """Before the tokenizer that should lie beside it, and before pictures that are too large for a row."""
    (tmp_path / "folder.json").mkdir()
    wrong = [("gone.json", "No such file"), ("folder.json", "[Dd]irectory"), ("a\0.json", "null byte")]
    for name, why in wrong:
        with pytest.raises(DataError, match=rf"DataConfig\.path='.*json': .*{why}.*; name a file of conversations"):
            loader(directory, tmp_path / name, tokenizer=None, seq_len=2)


PROMPTS: dict[str, tuple[dict[str, Any], Any]] = {
    "a system turn": (dict(conversations=[SYSTEM, ASK]), ("be brief", ("hi",), ())),
    "messages": (dict(messages=[ROLE_ASK, ROLE_SAY, ROLE_ASK]), (None, ("hi", "yes", "hi"), ())),
    "an answer at the end": (dict(messages=[ROLE_ASK, ROLE_SAY]), (None, ("hi",), ())),
    "gpt first": (dict(conversations=[SAY, ASK]), (None, ("hi",), ())),
    "parts": (dict(messages=[{"role": "user", "content": [{"type": "image", "image": "0.png"}, TEXT]}]), "picture"),
    "images": (dict(images=["0.png"], conversations=[SEE]), "picture"),
    "a video": (dict(video="a.mp4", conversations=[ASK]), "no encoder takes its video"),
    "half an emoji": (dict(conversations=[asked(HALF)]), "turn 0 holds half a character"),
    "a system turn alone": (dict(conversations=[SYSTEM]), "no question"),
}


@pytest.mark.parametrize("case", list(PROMPTS))
def test_prompts_are_read_by_the_same_rules(case: str, tmp_path: Path) -> None:
    entry, right = PROMPTS[case]
    path = tmp_path / "asked.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(entry).encode())
    right = (None, ("<image>\nhi",), (str(tmp_path / "0.png"),)) if right == "picture" else right
    if isinstance(right, str):
        with pytest.raises(ValueError, match=f"asked.jsonl:1: .*{right}"):
            read_prompts(path, (VISION,))
        return
    (prompt,) = read_prompts(path, (VISION,))
    assert (prompt.system, prompt.turns, prompt.files.get("image", ())) == right
