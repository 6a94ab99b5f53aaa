"""Prompts become the token ids of the training, in a run and behind its export, and of transformers' templates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hetjax.data import ItemSpec, Pictures, Template, jinja
from hetjax.generate import Prompt, ask
from hetjax.generate.chat import FolderChat, RunChat
from hetjax.generate.prompt import read_items, read_prompts
from hetjax.hf import chat_template

VISION = ItemSpec("vision", rows=3, reader=Pictures(4, 4))
CHART = ItemSpec("chart", rows=2, reader=Pictures(2, 2), field="plot", placeholder="<|plot|>")
CHATML = Template(
    "",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>",
    "\n",
    "<|im_start|>system\n",
    "<|im_end|>\n",
)
ODD = Template("é{{ \"quoted\" }} 'single' \\n", "🙂{% raw %}\t", ' \\"}}\n', "<|im_end|>", "  \n\n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, which shows every character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|im_start|>", "<|im_end|>", "<image>", "<|plot|>"])
    return found


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("template", [CHATML, ODD, Template(end_token="<|im_end|>")], ids=["chatml", "odd", "plain"])
def test_the_chat_template_of_an_export_gives_the_ids_of_the_run(
    template: Template, tokenizer: Tokenizer, picture: str
) -> None:
    items = (VISION, CHART)
    run = RunChat(tokenizer, template, items)
    folder = FolderChat(tokenizer, chat_template.write(template, items), items, specials={}, processor=True)
    prompts = [
        ask("what is it?"),
        ask("<image>\nwhat is it?", image=picture),
        ask("what is it?", image=[picture, picture], plot=picture),
        ask(" a <image> b <|plot|> <image> ", image=[picture, picture], plot=[picture]),
        Prompt(("one <image>", "answer {{ one }}", "two", "answer", "three"), {"image": (picture,)}),
        Prompt(("one", "two", "three"), {"image": (picture,)}),
        Prompt(("one", "two", "three"), {"image": (picture,)}, system="be 'brief' {{"),
        Prompt(("one",), system=""),
    ]
    for prompt in prompts:
        found = read_items(prompt, items)
        ours, theirs = run.encode(prompt, found), folder.encode(prompt, found)
        assert {name: list(places) for name, places in ours.starts.items()} == theirs.starts
        lying = {p: item for item in items for s in ours.starts[item.name] for p in range(s, s + item.rows)}
        assert all(theirs.tokens[p] == tokenizer.token_to_id(item.placeholder) for p, item in lying.items())
        text = lambda ids, lying=lying: [t for place, t in enumerate(ids.tokens) if place not in lying]
        assert text(ours) == text(theirs)


def test_other_roles_and_parts_than_the_training_had_are_refused() -> None:
    written = chat_template.write(CHATML, (VISION,))
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}):
        with pytest.raises(jinja.jinja2.TemplateError, match="the model was"):
            jinja.render(written, [message], {})


TEMPLATES = {
    "text": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '' }}{% endfor %}{{ eos_token }}",
    "printed": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}",
    "parts": "{% for m in messages %}<{{ m.role }}>{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{% generation %}{{ p.text }}{% endgeneration %}{% endfor %}"
    "{% endfor %}{{ eos_token }}",
}


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_templates_take_texts_or_parts_as_they_ask(kind: str, tokenizer: Tokenizer, picture: str) -> None:
    chat = FolderChat(tokenizer, TEMPLATES[kind], (VISION,), specials={"eos_token": "<|im_end|>"}, processor=True)
    spell = lambda prompt: tokenizer.decode(
        chat.encode(prompt, read_items(prompt, (VISION,))).tokens, skip_special_tokens=False
    )
    image = "<image>" * 3
    assert spell(ask("what?", image=picture)) == f"<user>{image}\nwhat?<|im_end|>"
    assert spell(ask("a <image> b", image=picture)) == f"<user>a {image} b<|im_end|>"
    assert spell(Prompt(("a", "b", "c"))) == "<user>a<assistant>b<user>c<|im_end|>"


def test_special_tokens_are_added_as_transformers_adds_them(tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = Tokenizer.from_str(tokenizer.to_str())
    start = adding.token_to_id("<|im_start|>")
    adding.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    plain, opened = "{{ messages[0].content }}", "{{ bos_token + messages[0].content }}"
    cases: list[tuple[str | None, bool, int]] = [
        (None, False, 1),  # no template: the tokenizer's own way
        (plain, False, 0),  # a tokenizer's template adds nothing
        (opened, False, 1),
        (plain, True, 1),  # a processor's lets the tokenizer add what is lacking
        (opened, True, 1),
    ]
    for template, processor, count in cases:
        chat = FolderChat(adding, template, (), specials={"bos_token": "<|im_start|>"}, processor=processor)
        assert chat.encode(ask("a"), {}).tokens.count(start) == count, (template, processor)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(jinja.jinja2.TemplateError, match="unsafe"):
        jinja.render(escape, [], {})


BROKEN: dict[str, tuple[Any, str]] = {
    "more placeholders": (ask("<image> <image>", image="a.png"), "2 <image>, image names 1 files"),
    "no encoder": (ask("x", audio="a.ogg"), "the model has no encoder for audio; it takes image"),
    "a placeholder in an answer": (
        Prompt(("a", "<image>", "b"), {"image": ("a.png",)}),
        "an answer contains <image>; it may stand in questions only",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_files_and_placeholders_must_agree(case: str, tokenizer: Tokenizer, picture: str) -> None:
    prompt, message = BROKEN[case]
    prompt = Prompt(
        prompt.turns, {k: tuple(picture if n == "a.png" else n for n in v) for k, v in prompt.files.items()}
    )
    chat = RunChat(tokenizer, CHATML, (VISION,))
    with pytest.raises(ValueError, match=message):
        chat.encode(prompt, read_items(prompt, chat.items))


def test_a_longer_token_hides_no_placeholder(tokenizer: Tokenizer, picture: str) -> None:
    hiding = Tokenizer.from_str(tokenizer.to_str())
    hiding.add_special_tokens(["<image>s"])
    prompt = ask("<image>s?", image=picture)
    first, second = (
        RunChat(t, CHATML, (VISION,)).encode(prompt, read_items(prompt, (VISION,))) for t in (tokenizer, hiding)
    )
    assert first == second


def test_a_template_that_fails_is_named(tokenizer: Tokenizer) -> None:
    chat = FolderChat(tokenizer, "{{ messages | length / 0 }}", (), specials={}, processor=False)
    with pytest.raises(ValueError, match="chat template refuses it: ZeroDivisionError"):
        chat.encode(ask("x"), {})


def test_files_of_prompts_are_read_line_by_line_and_their_faults_named(tmp_path: Path) -> None:
    path, turns = tmp_path / "asked.jsonl", [{"from": "human", "value": "a\u2028b\x85c"}]
    write = lambda **more: path.write_text(json.dumps({"conversations": turns} | more, ensure_ascii=False), "utf-8")
    write(image="a.png")
    (prompt,) = read_prompts(path, (VISION,))
    assert prompt == Prompt(("a\u2028b\x85c",), {"image": (str(tmp_path / "a.png"),)}, "1")
    (elsewhere,) = read_prompts(path, (VISION,), str(tmp_path / "media"))
    assert elsewhere.files == {"image": (str(tmp_path / "media" / "a.png"),)}
    for wrong in (5, {"a": "b"}, ["a.png", None]):
        write(image=wrong)
        with pytest.raises(ValueError, match=r"asked.jsonl:1: image=.*; it must be a file name or a list"):
            read_prompts(path, (VISION,))
    for wrong, message in (({}, "has no conversations"), ({"conversations": [*turns, *turns]}, "human begins")):
        write(**{"conversations": None} | wrong)
        with pytest.raises(ValueError, match=f"asked.jsonl:1: .*{message}"):
            read_prompts(path, ())
