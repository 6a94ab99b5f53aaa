"""A training by the chat template of a folder: ids are those of transformers, and the answers alone carry weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import speaking
from speaking import CHATML, VICUNA

from hetjax.data import ChatTemplate, DataConfig, ItemSpec, Loader, Pictures, tokens
from hetjax.data.items import Item
from hetjax.generate import Prompt
from hetjax.generate.chat import FolderChat, RunChat
from hetjax.hf import chat_template, pretrained
from hetjax.hf.errors import ConvertError
from hetjax.run import config, record
from hetjax.run.experiment import Experiment

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TURNS = ("what is it ?", "blue circle", "is it so ?", "red as a rose .")
MARKED = CHATML.replace("{{ p.text }}", "{% if m.role == 'assistant' %}{% generation %}{{ p.text }}{% endgeneration %}"
    "{% else %}{{ p.text }}{% endif %}")  # fmt: skip
STRINGS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: what an earlier answer thought is left out
THINKS = (
    "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | length %}"
    "{%- set seen = namespace(users=0) %}"
    "{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'user' %}"
    "{%- set seen.users = seen.users + 1 %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}{%- else %}"
    "{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if seen.users == last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}"
    "{%- endif %}{{- content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def messages(turns: tuple[str, ...], system: str | None = None) -> list[dict[str, Any]]:
    talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return talk if system is None else [{"role": "system", "content": system}, *talk]


def decoder(tmp_path: Path, template: str, kind: str) -> Path:
    directory = speaking.folder(tmp_path / "folder", "decoder", kind)
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.mark.parametrize("kind", list(speaking.KINDS))
@pytest.mark.parametrize("template", [VICUNA, CHATML, STRINGS], ids=["vicuna", "chatml", "marked"])
def test_ids_and_weights_are_those_of_transformers(template: str, kind: str, tmp_path: Path) -> None:
    directory = decoder(tmp_path, template, kind)
    made = pretrained.template(str(directory))
    assert isinstance(made, ChatTemplate) and made.end_token == ("</s>" if template == VICUNA else "<|im_end|>")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = tokens.open_tokenizer(directory / "tokenizer.json")
    speller = tokens.Speller(ours, [], made)
    for turns in (TURNS[:2], TURNS):
        system = None if template == VICUNA else "You are a helpful assistant."
        spelled = speller.spell(turns, {}, system=system)
        asked = theirs.apply_chat_template(
            messages(turns, system), return_dict=True, return_assistant_tokens_mask=template == STRINGS
        )
        assert spelled.tokens == asked["input_ids"]
        if template == STRINGS:
            assert spelled.answer == list(map(bool, asked["assistant_masks"]))
        said = [id for id, answer in zip(spelled.tokens, spelled.answer, strict=True) if answer]
        assert said.count(ours.token_to_id(made.end_token)) == len(turns) // 2
        if kind == "bytes":
            wanted = "".join(text + made.end_token for text in turns[1::2])
            assert ours.decode(said, skip_special_tokens=False).strip().replace(" ", "") == wanted.replace(" ", "")
        prompt = speller.spell(turns[:-1], {}, system=system).tokens
        assert prompt == theirs.apply_chat_template(
            messages(turns[:-1], system), add_generation_prompt=True, return_dict=False
        )


def entry(*texts: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]} | more


def loaded(directory: Path, made: ChatTemplate, entries: list[dict[str, Any]], items: Any = ()) -> Loader:
    (directory / "data.json").write_text(json.dumps(entries))
    path, file = str(directory / "data.json"), str(directory / "tokenizer.json")
    return Loader(DataConfig(path, 160, 1, tokenizer=file, template=made, shuffle=False, workers=1), items)


def test_what_earlier_answers_thought_is_trained_on_in_a_conversation_for_each_answer(tmp_path: Path) -> None:
    directory = decoder(tmp_path, THINKS, "bytes")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    turns = ("what ?", "<think>\nso\n</think>\n\nblue", "and ?", "<think>\nno\n</think>\n\nred")
    with loaded(directory, pretrained.template(str(directory)), [entry(*turns), entry("is it", "yes")]) as loader:
        rows = [arrays for arrays, _ in loader.one_pass()]
        assert len(rows) == loader.num_samples == 3 and not loader.bad
        for row, asked in zip(rows, (turns[:2], turns, ("is it", "yes")), strict=True):
            ids = theirs.apply_chat_template(messages(asked), return_dict=False)
            assert row["tokens"][0, : len(ids) - 1].tolist() == ids[:-1]
            said = row["targets"][0][row["weights"][0] > 0]
            text = loader.tokenizer.decode(said.tolist(), skip_special_tokens=False)
            thought = asked[-1] if "<think>" in asked[-1] else f"<think>\n\n</think>\n\n{asked[-1]}"
            assert text == f"{thought}<|im_end|>"


def test_a_template_that_opens_answers_otherwise_than_it_keeps_them_is_refused_by_name(tmp_path: Path) -> None:
    opens = CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>\n' }}{% endif %}")
    directory = decoder(tmp_path, opens, "bytes")
    loader = loaded(directory, pretrained.template(str(directory)), [entry("what", "blue")])
    with loader, pytest.raises(ValueError, match=r"opens answers with .*<think>.*, but not this one; type"):
        loader.next_step(1)


def test_special_tokens_in_texts_stay_texts_under_a_chat_template(tmp_path: Path) -> None:
    directory = decoder(tmp_path, CHATML, "bytes")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    made = pretrained.template(str(directory))
    speller = tokens.Speller(tokens.open_tokenizer(directory / "tokenizer.json"), [], made)
    turns = ("is <|im_end|> it", "yes <|im_end|> and </s> <image>")
    ids = theirs.apply_chat_template(messages(turns), return_dict=False, sanitize_control_tokens=True)
    assert speller.spell(turns, {}).tokens == ids


@pytest.mark.parametrize(
    ("token", "text"),
    [("<image>", "<image>\nwhat is it ?"), ("<picture>", "what <picture> is it ?"), ("<image>", "what")],
)
def test_pictures_become_parts_of_the_template(token: str, text: str, tmp_path: Path) -> None:
    from PIL import Image

    directory = speaking.folder(tmp_path / "folder", "llava", "bytes")
    Image.new("RGB", (8, 8)).save(directory / "a.png")
    item = ItemSpec("vision", 4, Pictures(8, 8), placeholder=token)
    made = pretrained.template(str(directory))
    assert isinstance(made, ChatTemplate) and made.parts == {"image": "<image>"} and made.whole
    theirs = transformers.AutoProcessor.from_pretrained(directory)
    before, _, behind = text.rpartition(token)
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": behind.removeprefix("\n")}]
    asked = [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]
    asked[0]["content"] = (
        [{"type": "image"}, {"type": "text", "text": "what"}] if token not in text else asked[0]["content"]
    )
    asked.append({"role": "assistant", "content": [{"type": "text", "text": "blue"}]})
    rendered = theirs.apply_chat_template(asked, tokenize=False)
    ids = theirs(text=rendered, images=[Image.open(directory / "a.png")])["input_ids"][0]
    with loaded(directory, made, [entry(text, "blue", image="a.png")], [item]) as loader:
        ((arrays, _),) = loader.one_pass()
    place = ids.index(5)
    assert ids.count(5) == 4 and arrays["vision.index"][0, place : place + 4].tolist() == [0, 1, 2, 3]
    ids[place : place + 4] = [tokens.NO_TEXT] * 4
    assert arrays["tokens"][0, : len(ids) - 1].tolist() == ids[:-1]


def test_what_cannot_train_is_refused_with_a_way_out(tmp_path: Path) -> None:
    directory = decoder(tmp_path, "{{ messages | map(attribute='content') | join(' ') }}", "bytes")
    with pytest.raises(ConvertError, match="puts '' behind an answer, which holds no token that could end it"):
        pretrained.template(str(directory))
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ConvertError, match=r"has no chat template; set a settings.Template\(\) instead"):
        pretrained.template(str(directory))
    with pytest.raises(ValueError, match="date='tomorrow'"):
        ChatTemplate("", "</s>", date="tomorrow")


def test_the_date_is_that_of_the_run_s_start_and_stays(tmp_path: Path) -> None:
    directory = decoder(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML, "bytes")
    changes = {
        "settings.DataConfig.template": runs.Reference("@pretrained.template()"),
        "pretrained.template.path": str(directory),
    }
    gin = runs.write(tmp_path)
    gin.write_text(f"from hetjax.hf import pretrained\n{gin.read_text()}")
    run = record.dated(runs.load(gin, changes), tmp_path / "run")
    assert isinstance(run.data.template, ChatTemplate) and run.data.template.date is not None
    (tmp_path / "run").mkdir()
    earlier = config.operative(run).replace(run.data.template.date, "2001-02-03")
    (tmp_path / "run" / record.OPERATIVE).write_text(earlier)
    assert config.load([str(tmp_path / "run" / record.OPERATIVE)], [], Experiment).data.template.date == "2001-02-03"  # type: ignore[union-attr]
    resumed = record.dated(runs.load(gin, changes), tmp_path / "run")
    assert isinstance(resumed.data.template, ChatTemplate) and resumed.data.template.date == "2001-02-03"
    speller = tokens.Speller(tokens.open_tokenizer(directory / "tokenizer.json"), [], resumed.data.template)
    ids = speller.spell(("what",), {}).tokens
    text = tokens.open_tokenizer(directory / "tokenizer.json").decode(ids, skip_special_tokens=False)
    assert text.startswith("03 Feb 2001<|im_start|>user")
    (directory / "chat_template.jinja").write_text(chat_template.kept(resumed.data.template, []))
    exported = transformers.AutoTokenizer.from_pretrained(directory)
    assert exported.apply_chat_template(messages(("what",)), add_generation_prompt=True, return_dict=False) == ids


def test_a_template_of_texts_gets_the_pictures_of_a_run_and_its_export_takes_parts(tmp_path: Path) -> None:
    directory = speaking.folder(tmp_path / "folder", "llava", "bytes")
    strings = VICUNA.replace("ASSISTANT: ", "ASSISTANT:")
    (directory / "chat_template.jinja").write_text(strings)
    item = ItemSpec("vision", 3, Pictures(8, 8))
    made = ChatTemplate(strings, "</s>", {"bos_token": "<s>", "eos_token": "</s>"}, date="2024-02-29")
    (directory / "chat_template.jinja").write_text(chat_template.kept(made, [item]))
    tokenizer, found = tokens.open_tokenizer(directory / "tokenizer.json"), {"vision": [Item({}, 3)]}
    run = RunChat(tokenizer, made, [item])
    kept = FolderChat(tokenizer, chat_template.kept(made, [item]), [item], specials=made.names, processor=True)
    theirs = transformers.AutoProcessor.from_pretrained(directory)
    for typed in ("what is it", "<image> what", "what <image> is it", "<image>\nwhat", "<image>"):
        prompt = Prompt((typed, "a dog", "so"), {"image": ("a.png",)})
        told: list[Any] = [{"type": "text", "text": typed}]
        asked = messages(prompt.turns)
        asked[0]["content"] = told if "<image>" in typed else [{"type": "image"}, *told]
        text = theirs.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = theirs.tokenizer(text.replace("<image>", "<image>" * 3), add_special_tokens=False)["input_ids"]
        assert kept.encode(prompt, found).tokens == ids
        place = ids.index(5)
        ids[place : place + 3] = [tokens.NO_TEXT] * 3
        assert run.encode(prompt, found).tokens == ids
