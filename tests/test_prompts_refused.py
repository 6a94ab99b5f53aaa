"""What a folder's template and tokenizer say of a training: it is done as transformers does it, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import speaking
from speaking import CHATML, write_json
from test_prompts_wild import DATE, edit, flags, template
from test_template import messages

from hetjax import generate
from hetjax.data import DataConfig, tokens
from hetjax.data.problems import SampleError
from hetjax.generate import beside
from hetjax.generate.prompt import read_items
from hetjax.hf import pretrained, processor, prompts
from hetjax.hf.source import read_json
from hetjax.hf.stored import open_source
from hetjax.run.experiment import Experiment, LanguageModel
from models.decoder import Decoder

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_templates_get_every_token_that_the_folder_names(tmp_path: Path) -> None:
    """In generation and in training."""
    folder = speaking.folder(tmp_path / "folder", "llava", "bytes")
    named = CHATML.replace("<image>\n", "{{ boi_token }}{{ image_token }}{{ eoi_token }}{{ vision_token }}\n")
    template(named)(folder)
    extra = dict(image_token="<image>", boi_token="<|audio_bos|>")
    object = dict(content="<|audio_eos|>", special=True)
    edit("tokenizer_config.json", extra_special_tokens=extra, eoi_token=object | {"__type": "AddedToken"})(folder)
    edit("tokenizer_config.json", vision_token=object)(folder)
    source, asked = open_source(folder), speaking.prompts(tmp_path, "llava")
    chat = beside.chat(source, source.extras["llm"], DATE)
    theirs = speaking.Theirs(folder, "llava", loads=False)
    assert [chat.encode(p, read_items(p, chat.items)).tokens for p in asked] == [theirs.ids(p) for p in asked]
    made = pretrained.template(str(folder))
    trained = generate.chat.RunChat(tokens.open_tokenizer(folder / "tokenizer.json"), made, chat.items)
    places = [(i, id) for i, id in enumerate(theirs.ids(asked[0])) if id != theirs.processor.image_token_id]
    ids = trained.encode(asked[0], read_items(asked[0], chat.items)).tokens
    assert [(i, ids[i]) for i, _ in places] == places


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_a_training_has_every_token_of_the_folder_or_is_refused(name: str, tmp_path: Path) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(CHATML)(folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] != "<|im_start|>"]
    made["model"]["vocab"] = {k.replace("<|im_start|>", "other"): v for k, v in made["model"]["vocab"].items()}
    write_json(folder / "tokenizer.json", made)
    added = {"<|im_start|>": 369}
    decoder = {"369": dict(content="<|im_start|>", special=True)}
    edit(name, **(added if name == "added_tokens.json" else dict(added_tokens_decoder=decoder)))(folder)
    with pytest.raises(ValueError, match=r"tokenizer.json lacks '<\|im_start\|>'.*save_pretrained"):
        pretrained.template(str(folder))
    transformers.PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    written = pretrained.template(str(folder))
    speller = tokens.Speller(tokens.open_tokenizer(folder / "tokenizer.json"), [], written)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages(("what", "blue")), return_dict=False)
    assert speller.spell(("what", "blue"), {}).tokens == ids


GLM = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "end", "says"),
    [
        (CHATML, "</s>", r"'<\|im_end\|>\\n'.*lacks .*end_token='</s>'; leave it out, which takes '<\|im_end\|>'"),
        (GLM, "</s>", r"lacks .*end_token='</s>'; .*@settings.Template\(\)"),
        (GLM, None, r"holds no token that could end it; .*@settings.Template\(\)"),
    ],
)
def test_an_end_that_the_template_never_writes_is_refused(
    text: str, end: str | None, says: str, tmp_path: Path
) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(text)(folder)
    with pytest.raises(ValueError, match=says):
        pretrained.template(str(folder), end_token=end)


def test_a_special_token_that_depends_on_the_text_beside_it_is_refused(tmp_path: Path) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(CHATML)(folder)
    flags(single_word=True)(folder)
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' has single_word=true.*set it to false in tokenizer.json"):
        pretrained.template(str(folder))
    source = open_source(folder)
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' has single_word=true"):
        beside.chat(source, source.extras["llm"], DATE)


# As DeepSeek-R1's: a prompt opens a thought, which the answers of a conversation do not have
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|audio_bos|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|audio_bos|><think>\n{% endif %}"
)


def test_a_prompt_that_opens_what_answers_lack_is_named(tmp_path: Path) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(R1)(folder)
    speller = tokens.Speller(tokens.open_tokenizer(folder / "tokenizer.json"), [], pretrained.template(str(folder)))
    for turns in (("what", "blue"), ("what", "blue", "and", "red")):
        with pytest.raises(
            SampleError,
            match=r"opens answers with '<\|audio_bos\|><think>\\n', but not this one; type a settings.Template",
        ):
            speller.spell(turns, {})


@pytest.mark.parametrize("place", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_that_is_not_utf_8_is_named(place: str, tmp_path: Path) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template(CHATML, place)(folder)
    (folder / place).write_text(CHATML, "utf-16")
    with pytest.raises(ValueError, match=rf"{place}: .*not UTF-8.*save it as UTF-8"):
        pretrained.template(str(folder))


READ_AS = [
    ("llama", "Qwen2TokenizerFast", "bytes", {}),
    ("llama", "GPT2Tokenizer", "bytes", {}),
    ("llama", "GPT2Tokenizer", "bytes", dict(add_prefix_space=True)),
    ("llama", "CodeLlamaTokenizer", "bytes", {}),
    ("llama", "GemmaTokenizer", "bytes", {}),
    ("llama", "LlamaTokenizer", "bytes", {}),
    ("llama", "LlamaTokenizer", "pieces, a space in front of each", {}),
    ("llama", "PreTrainedTokenizerFast", "bytes", {}),
    ("llama", "PreTrainedTokenizerFast", "bytes", dict(split_special_tokens=True)),
    ("mistral", "LlamaTokenizerFast", "pieces, a space in front of each", {}),
    ("qwen3", "Qwen2Tokenizer", "bytes", {}),
    ("qwen3", None, "bytes", {}),
    ("qwen3", "PreTrainedTokenizerFast", "bytes", {}),
]


@pytest.mark.parametrize(("kind", "name", "tokenizer", "extra"), READ_AS)
def test_a_class_that_makes_other_ids_than_the_file_is_named(
    kind: str, name: str | None, tokenizer: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", tokenizer)
    edit("config.json", model_type=kind)(folder)
    settings = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", tokenizer_class=name) | extra
    write_json(folder / "tokenizer_config.json", {k: value for k, value in settings.items() if value is not None})
    text = "<|im_start|>it's 12 cafe\u0301   a rose .\n\nis it<|im_end|>\nso"
    theirs = transformers.AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    made = tokens.open_tokenizer(folder / "tokenizer.json")
    said = prompts.otherwise(json.loads((folder / "tokenizer.json").read_text()), settings, kind)
    assert bool(said) == (made.encode(text, add_special_tokens=False).ids != theirs)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (dict(max_new_tokens=2048, max_length=4096), "say max_new_tokens=2048; max_new_tokens is 128 unless"),
        (dict(max_length=4096), "say max_length=4096; max_new_tokens is 128 unless"),
    ],
)
def test_the_length_that_a_folder_gives_answers_is_named(
    told: dict[str, int], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    edit("generation_config.json", **told)(folder)
    generate.load(folder)
    assert says in caplog.text


def test_the_export_of_a_run_with_another_tokenizer_keeps_the_names_that_its_template_writes(tmp_path: Path) -> None:
    folder = speaking.folder(tmp_path / "folder", "decoder", "bytes")
    template("{{ bos_token }}" + CHATML.replace("<|im_end|>", "' + turn_token + '"))(folder)
    edit("tokenizer_config.json", extra_special_tokens=dict(turn_token="<|im_end|>"))(folder)
    speaking.tokenizer("words").save(str(tmp_path / "words.json"))
    made = pretrained.template(str(folder))
    data = DataConfig("a.json", 64, 1, tokenizer=str(tmp_path / "words.json"), template=made)
    model = Decoder(vocab_size=speaking.VOCAB, width=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=8)
    run = Experiment(LanguageModel(model), data)
    for name, value in processor.spoken(run, [], read_json(data.tokenizer_path), {}, whole=False).items():
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    spelled = tokens.Speller(tokens.load_tokenizer(data, []), [], made).spell(("what", "blue"), {})
    assert spelled.tokens == theirs.apply_chat_template(messages(("what", "blue")), return_dict=False)
