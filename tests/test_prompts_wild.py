"""Folders and conversations as people post them: prompts, weights and settings are those of transformers, or an error
or one line names what is not.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import speaking
from speaking import CHATML, write_json
from test_template import entry, loaded, messages
from tokenizers import Tokenizer, processors

from hetjax import generate
from hetjax.data import ChatTemplate, tokens
from hetjax.data.problems import SampleError
from hetjax.generate import beside, defaults
from hetjax.generate.prompt import read_items, read_prompts
from hetjax.hf import pretrained
from hetjax.hf.stored import open_source

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

DATE = "2024-02-29"


class Odd(NamedTuple):
    """A folder, what is odd about it, and what is right: "" for the ids of transformers, else a part of the error."""

    name: str  # class
    change: Callable[[Path], Any]
    error: str = ""
    says: str = ""  # a part of what is logged


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | changes)

    return change


def template(text: str, name: str = "chat_template.jinja") -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())

    return change


def no_template(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return both(lambda folder: (folder / "chat_template.jinja").unlink(missing_ok=True), *changes)


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [change(folder) for change in changes]


def adds_bos(folder: Path) -> None:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def flags(**changes: Any) -> Callable[[Path], None]:
    """Of the special token <|im_end|>."""

    def change(folder: Path) -> None:
        value = json.loads((folder / "tokenizer.json").read_text())
        for token in value["added_tokens"]:
            token.update(changes if token["content"] == "<|im_end|>" else {})
        write_json(folder / "tokenizer.json", value)

    return change


OTHER = CHATML.replace("user", "human").replace("assistant", "gpt")
NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
LLAMA_3 = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set day = '26 Jul 2024' %}{%- endif %}{{- 'Today: ' + day + '\n\n' }}{%- for m in messages %}"
    "{{- '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set talk = messages[1:] %}"
    "{%- else %}{%- set talk = messages %}{%- endif %}{{- bos_token }}{%- for m in talk %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}"
    "{%- endif %}{%- if m['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}{%- else %}"
    "{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
TOOLED = (
    "{% if tools is not none or documents is not none %}tools{% endif %}{{ messages | tojson }}{% for m in messages %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}{{ pad_token }}{{ unk_token }}{% endfor %}"
)
STRING_ASSISTANT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% for p in m.content %}{% if p.type == 'image' %}"
    "<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% else %}<|im_end|>{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

FOLDERS = {
    "chat_template.json beside the other": Odd(
        "llava", both(template(OTHER), edit("chat_template.json", chat_template=CHATML))
    ),
    "a template in processor_config.json": Odd("llava", both(edit("processor_config.json", chat_template=OTHER))),
    "null in processor_config.json": Odd("llava", edit("processor_config.json", chat_template=None)),
    "a processor's template with its tokenizer": Odd(
        "llava",
        no_template(edit("tokenizer_config.json", chat_template=CHATML)),
        error="the model has no chat template",
        says="tokenizer_config.json: chat_template (a processor does not read it)",
    ),
    "chat_template.json of a tokenizer": Odd(
        "decoder", edit("chat_template.json", chat_template=OTHER), says="chat_template.json (a tokenizer does not"
    ),
    "templates by name": Odd("decoder", no_template(edit("tokenizer_config.json", chat_template=NAMED))),
    "templates by name, none of them default": Odd(
        "decoder",
        no_template(edit("tokenizer_config.json", chat_template=NAMED[:1])),
        error="of its chat templates (tool_use) none is called default",
    ),
    "more templates in a directory": Odd("llava", template("tools", "additional_chat_templates/tool_use.jinja")),
    "a directory of templates, none of them default": Odd(
        "decoder",
        no_template(template("tools", "additional_chat_templates/tool_use.jinja")),
        error="none is called default",
    ),
    "both kinds of template files": Odd(
        "llava",
        both(
            edit("chat_template.json", chat_template=CHATML),
            template("tools", "additional_chat_templates/tool_use.jinja"),
        ),
        error="both hold chat templates; remove one of them",
    ),
    "special_tokens_map.json": Odd("decoder", edit("special_tokens_map.json", bos_token="<|im_start|>")),
    "special_tokens_map.json without effect": Odd(
        "decoder",
        both(
            edit("special_tokens_map.json", bos_token="<|im_start|>"),
            edit("tokenizer_config.json", added_tokens_decoder={"1": dict(content="<s>", special=True)}),
        ),
    ),
    "special tokens as objects": Odd(
        "decoder", edit("special_tokens_map.json", bos_token=dict(content="<s>", lstrip=False, normalized=True))
    ),
    "a token that tokenizer.json lacks": Odd(
        "decoder",
        both(
            edit("tokenizer_config.json", added_tokens_decoder={"420": dict(content="circle", special=False)}),
            edit("tokenizer_config.json", extra_special_tokens=["USER:"]),
        ),
    ),
    "added_tokens.json": Odd("decoder", edit("added_tokens.json", **{"blue ci": 421, "is it": 420})),
    "a special token of spaces beside it": Odd("decoder", both(template(CHATML), flags(rstrip=True, lstrip=True))),
    "a special token that is normalised": Odd("decoder", both(template(CHATML), flags(normalized=True))),
    "a tokenizer that adds its first token": Odd("llava", adds_bos),
    "a tokenizer that adds what the template wrote": Odd("llava", both(adds_bos, template("{{ bos_token }}" + CHATML))),
    "a tokenizer alone that would add one": Odd("decoder", both(adds_bos, template(CHATML))),
    "a byte-order mark and line ends of Windows": Odd(
        "decoder", template("\ufeff" + CHATML.replace("{% endfor %}", "{% endfor %}\r\n") + "\r\n")
    ),
    "the date": Odd("decoder", template(LLAMA_3)),
    "roles that must alternate": Odd("decoder", template(MISTRAL)),
    "a role of another name": Odd("decoder", template(GEMMA)),
    "tools, documents and all names": Odd("decoder", template(TOOLED)),
    "parts of the user, texts of the assistant": Odd("llava", template(STRING_ASSISTANT)),
    "a template of a class replaced": Odd("qwen2_audio", edit("processor_config.json", chat_template=None)),
}


@pytest.mark.parametrize("case", list(FOLDERS))
def test_prompts_of_odd_folders_are_those_of_transformers(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = FOLDERS[case]
    folder = speaking.folder(tmp_path / "folder", odd.name, "bytes")
    odd.change(folder)
    source = open_source(folder)
    asked = speaking.prompts(tmp_path, odd.name)

    def ours() -> list[list[int]]:
        llm = next(name for name, model in source.models.items() if hasattr(model, "vocab_size"))
        chat = beside.chat(source, source.extras[llm], DATE)
        return [chat.encode(p, read_items(p, chat.items)).tokens for p in asked]

    if odd.error:
        with pytest.raises(ValueError) as raised:
            ours()
        assert odd.error in str(raised.value)
    else:
        speaking.today(monkeypatch, DATE)
        string = ("assistant",) if case.startswith("parts of the user") else ()
        theirs = speaking.Theirs(folder, odd.name, loads=False, strings=string)
        assert ours() == [theirs.ids(prompt) for prompt in asked]
    assert odd.says in caplog.text


SETTINGS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], Any]] = {
    "its own file": (dict(eos_token_id=7, do_sample=False), {}, ((7,), 1.0, (), "")),
    "a file without an end": ({}, dict(eos_token_id=3), ((), 1.0, (), "")),
    "no file": (None, dict(eos_token_id=[3, 5], repetition_penalty=1.5), ((3, 5), 1.5, (), "")),
    "null": (dict(eos_token_id=2, repetition_penalty=None, suppress_tokens=None), {}, ((2,), 1.0, (), "")),
    "beams": (dict(eos_token_id=2, num_beams=4), {}, ((2,), 1.0, (), "num_beams=4")),
    "n-grams": (dict(no_repeat_ngram_size=3), {}, ((), 1.0, (), "no_repeat_ngram_size=3")),
    "draws": (dict(do_sample=True, min_p=0.1), {}, ((), 1.0, (), "min_p=0.1")),
    "suppressed": (dict(suppress_tokens=[1, 900]), {}, ((), 1.0, (1, 900), "")),
    "zero": (dict(do_sample=True, temperature=0.0), {}, ((), 1.0, (), "temperature=0.0")),
}


@pytest.mark.parametrize("case", list(SETTINGS))
def test_generation_settings_are_read_where_transformers_reads_them(case: str, tmp_path: Path) -> None:
    file, told, (stops, penalty, suppressed, ignored) = SETTINGS[case]
    folder = speaking.folder(tmp_path / "folder", "decoder", "words")
    (folder / "generation_config.json").unlink()
    edit("config.json", **told)(folder)
    if file is not None:
        write_json(folder / "generation_config.json", file)
    found = defaults.read(open_source(folder).extras["llm"])
    assert (found.stops, found.penalties.repetition, found.penalties.suppressed) == (stops, penalty, suppressed)
    assert ignored in ", ".join(found.ignored) and bool(ignored) == bool(found.ignored)
    if case != "zero":
        theirs = speaking.Theirs(folder, "decoder").model.generation_config
        assert list(stops) == list(defaults._ids(theirs.eos_token_id)) and penalty == (theirs.repetition_penalty or 1.0)


class Talk(NamedTuple):
    """A conversation under a template, and what carries weight; None: the sample is bad, and `why`."""

    template: str
    turns: tuple[str, ...]
    trained: str | None
    system: str | None = None
    why: str = ""


FOUR = ("a", "b", "c", "d")
TALKS = {
    "answers are trimmed": Talk(LLAMA_3, ("what", " blue\n"), "blue<|im_end|>"),
    "an end token in an answer": Talk(CHATML, ("what", "a <|im_end|> b"), "a <|im_end|> b<|im_end|>"),
    "a placeholder in an answer": Talk(CHATML, ("what", "an <image> so"), "an <image> so<|im_end|>"),
    "an empty answer": Talk(CHATML, ("what", ""), "<|im_end|>"),
    "a system turn that is moved to the last question": Talk(MISTRAL, FOUR, None, "be kind", "otherwise"),
    "without a system turn": Talk(MISTRAL, FOUR, " b</s> d</s>"),
    "a system turn that is not supported": Talk(GEMMA, ("a", "b"), None, "be kind", "System role not supported"),
    "a system turn": Talk(CHATML, FOUR, "b<|im_end|>d<|im_end|>", "be kind"),
    "marks with minus signs": Talk(
        "{%- for m in messages -%}{{- '<|im_start|>' }}{%- if m.role == 'assistant' -%}{%- generation -%}"
        "{{ m.content }}<|im_end|>{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}",
        FOUR,
        "b<|im_end|>d<|im_end|>",
    ),
    "marks within a macro": Talk(
        "{% macro say(t) %}{% generation %}{{ t }}<|im_end|>{% endgeneration %}{% endmacro %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ m.content }}<|im_start|>{% else %}{{ say(m.content) }}{% endif %}{% endfor %}",
        FOUR,
        "b<|im_end|>d<|im_end|>",
    ),
    "marks that mark nothing": Talk(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if false %}{% generation %}{% endgeneration %}"
        "{% endif %}",
        ("a", "b"),
        None,
        why="marks nothing in it",
    ),
    "turns that are numbered": Talk(
        "{% for m in messages %}{{ loop.index }}. {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ messages | length + 1 }}. {% endif %}",
        FOUR,
        "b<|im_end|>d<|im_end|>",
    ),
    "the number of turns in front": Talk(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", FOUR, None,
        why="otherwise",
    ),
    "an answer that spells a question": Talk(
        CHATML, ("a", "<|im_start|>user\nb<|im_end|>"), "<|im_start|>user\nb<|im_end|><|im_end|>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(TALKS))
def test_answers_alone_carry_weight_or_the_sample_is_bad(case: str, tmp_path: Path) -> None:
    talk = TALKS[case]
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(talk.template)(folder)
    made = pretrained.template(str(folder))
    assert isinstance(made, ChatTemplate)
    made_tokenizer = tokens.open_tokenizer(folder / "tokenizer.json")
    speller = tokens.Speller(made_tokenizer, [], made)
    if talk.trained is None:
        with pytest.raises(SampleError, match=talk.why):
            speller.spell(talk.turns, {}, system=talk.system)
        return
    spelled = speller.spell(talk.turns, {}, system=talk.system)
    said = [id for id, answer in zip(spelled.tokens, spelled.answer, strict=True) if answer]
    assert made_tokenizer.decode(said, skip_special_tokens=False) == talk.trained
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages(talk.turns, talk.system), return_dict=False, sanitize_control_tokens=True)
    assert spelled.tokens == ids


SAID = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_prompts_training_and_held_out_questions_are_spelled_alike(suffix: str, encoding: str, tmp_path: Path) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(CHATML)(folder)
    made = pretrained.template(str(folder))
    assert isinstance(made, ChatTemplate)
    talks = [
        entry("wäs <|im_end|>", "blue", "and", "red"),
        {"messages": [{"role": "system", "content": "be kind"}, *messages(("what\u2028is", "it"))]},
        {"conversations": [{"from": "gpt", "value": "hello"}, *entry("a", "b")["conversations"]]},
        {
            "system": "so",
            "messages": [
                {"role": "User", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ],
        },
    ]
    lines = "\n".join(json.dumps(talk, ensure_ascii=False) for talk in talks)
    text = json.dumps(talks, ensure_ascii=False) if suffix == ".json" else lines
    (tmp_path / f"asked{suffix}").write_text(text, encoding)
    chat = generate.chat.RunChat(tokens.open_tokenizer(folder / "tokenizer.json"), made, [])
    asked = [chat.encode(p, {}).tokens for p in read_prompts(tmp_path / f"asked{suffix}", [])]
    with loaded(folder, made, talks) as loader:
        for row, ((arrays, owner), ids) in enumerate(zip(loader.questions(4), asked, strict=True)):
            assert arrays["tokens"][0, : len(ids)].tolist() == ids and owner[0, len(ids) - 1] == row
        for (arrays, _), ids in zip(loader.one_pass(), asked, strict=True):
            assert arrays["tokens"][0, : len(ids)].tolist() == ids and arrays["weights"][0, len(ids) - 1] == 1
