"""Prompts and answers are those of transformers: classes x tokenizers x turns x one prompt or a padded batch.

Nothing is overridden there but `do_sample=False`. Skipped where torch and transformers are not installed.
"""

import json
from pathlib import Path

import pytest
import speaking

from hetjax import generate
from hetjax.data import DataConfig, Template, tokens
from hetjax.generate import Prompt
from hetjax.generate.chat import RunChat
from hetjax.generate.prompt import read_items
from hetjax.generate.sample import Sampling
from hetjax.hf import processor, source
from hetjax.run.experiment import Experiment, LanguageModel
from models.decoder import Decoder

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NEW = 6


@pytest.mark.parametrize("kind", list(speaking.KINDS))
@pytest.mark.parametrize("name", ["decoder", "llava", "qwen2_audio"])
def test_ids_answers_and_settings_are_those_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    directory = speaking.folder(tmp_path / "folder", name, kind)
    asked, theirs, model = speaking.prompts(tmp_path, name), speaking.Theirs(directory, name), generate.load(directory)
    ours = [model.chat.encode(p, read_items(p, model.chat.items)).tokens for p in asked]
    assert ours == [theirs.ids(prompt) for prompt in asked]
    said = [answer.tokens for answer in model(asked, max_new_tokens=NEW)]
    assert said == [theirs.answers([prompt], NEW)[0] for prompt in asked]
    assert said == theirs.answers(asked, NEW)
    assert len(set(map(tuple, said))) > 1
    settings = theirs.model.generation_config
    assert model.defaults.sampling == Sampling(settings.temperature, settings.top_k, settings.top_p)
    assert model.defaults.penalties.repetition == settings.repetition_penalty and model.defaults.ignored == ()
    assert list(model.defaults.stops) == settings.eos_token_id


CHATML = Template(
    human_prefix="<|im_start|>user\n",
    human_suffix="<|im_end|>\n<|im_start|>assistant\n",
    end_token="<|im_end|>",
    answer_suffix="\n",
    system_prefix="<|im_start|>system\n",
    system_suffix="<|im_end|>\n",
)
TEMPLATES = {
    "chatml": CHATML,
    "vicuna": Template(start="<s>", human_prefix="USER: ", human_suffix=" ASSISTANT:", end_token="</s>"),
    "vicuna with a space": Template(human_prefix="USER: ", human_suffix=" ASSISTANT: ", end_token="</s>"),
    "bare": Template(human_suffix="", end_token="</s>"),
}
TURNS = ("what is it ?", "blue circle", "is it </s> so ?", "red as a rose .")


@pytest.mark.parametrize("kind", list(speaking.KINDS))
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_prompts_training_and_export_of_a_run_have_the_same_ids(template: str, kind: str, tmp_path: Path) -> None:
    import transformers

    made = speaking.tokenizer(kind)
    made.save(str(tmp_path / "words.json"))
    turns = [t.replace("</s>", "it") if kind == "words" else t for t in TURNS]  # which cannot write it as text
    words = tuple(turns)
    data = DataConfig("a.json", 64, 1, tokenizer=str(tmp_path / "words.json"), template=TEMPLATES[template])
    model = Decoder(vocab_size=made.get_vocab_size(), width=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=8)
    run = Experiment(LanguageModel(model), data)
    for name, value in processor.spoken(run, [], source.read_json(data.tokenizer_path), {}, whole=False).items():
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = RunChat(tokens.load_tokenizer(data, []), data.template, [])
    spelled = tokens.Speller(chat.tokenizer, [], data.template).spell(words, {})

    def expected(turns: tuple[str, ...]) -> list[int]:
        messages = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)]
        asks, sane = len(turns) % 2 == 1, "</s>" in "".join(turns)
        return theirs.apply_chat_template(
            messages, add_generation_prompt=asks, return_dict=False, sanitize_control_tokens=sane
        )

    assert spelled.tokens == expected(words)
    ends = [n + 1 for n, (a, b) in enumerate(zip(spelled.answer, [*spelled.answer[1:], False], strict=True)) if a > b]
    for number, end in zip((1, 3), ends, strict=True):
        prompt = chat.encode(Prompt(words[:number]), {}).tokens
        assert prompt == expected(words[:number]) == spelled.tokens[: len(prompt)]
        assert spelled.answer[len(prompt) : end] == [True] * (end - len(prompt)) and not spelled.answer[len(prompt) - 1]
        assert spelled.tokens[end - 1] == made.token_to_id(data.template.end_token)
        said = "".join(made.decode(spelled.tokens[len(prompt) : end - 1]).split())
        assert kind == "words" or said == words[number].replace(" ", "")
