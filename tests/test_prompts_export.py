"""What an export says of prompts and answers is what the run means, whatever the folder said that it started from."""

import json
from pathlib import Path
from typing import Any

import pytest
import speaking
from PIL import Image

from hetjax import convert, generate, train
from hetjax.generate.prompt import read_items

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

GIN = """
from hetjax.core import optimizer
from hetjax.data import settings
from hetjax.hf import pretrained
from hetjax.run import experiment
experiment.Experiment.emulated_devices = 8
experiment.Experiment.llm = @experiment.LanguageModel()
experiment.Experiment.encoders = [@experiment.Encoder()]
experiment.Experiment.data = @settings.DataConfig()
experiment.Experiment.optimizer = @optimizer.OptimizerConfig()
experiment.Experiment.init_from = {"llm": "FOLDER", "vision": "FOLDER"}
experiment.Experiment.steps = 2
optimizer.OptimizerConfig.learning_rate = 1e-2
experiment.LanguageModel.model = @pretrained.decoder()
pretrained.decoder.path = "FOLDER"
experiment.Encoder.model = @pretrained.encoder()
pretrained.encoder.path = "FOLDER"
settings.DataConfig.path = "FOLDER/data.json"
settings.DataConfig.seq_len = 128
settings.DataConfig.samples_per_group = 2
settings.DataConfig.template = TEMPLATE
"""
PLAIN = """@settings.Template()
settings.Template.human_prefix = "USER: "
settings.Template.human_suffix = " ASSISTANT: "
settings.Template.end_token = "</s>"
"""
CHAT = """@pretrained.template()
pretrained.template.path = "FOLDER"
"""


def base(directory: Path) -> Path:
    """A folder whose every file says something of its own of prompts and answers."""
    folder = speaking.folder(directory / "folder", "llava", "bytes")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    odd = dict(padding_side="right", chat_template="old", split_special_tokens=True)
    odd |= dict(extra_special_tokens=dict(shown_token="<image>"))
    speaking.write_json(folder / "tokenizer_config.json", settings | odd)
    written = speaking.CHATML.replace("<image>\n", "{{ shown_token }}\n")
    (folder / "chat_template.jinja").write_text(written)
    speaking.write_json(folder / "special_tokens_map.json", dict(eos_token="<|im_start|>", pad_token="<unk>"))
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    talk = [("human", "what is it ?"), ("gpt", "a red dog"), ("human", "is it so ?"), ("gpt", "yes , it is")]
    turns = [{"from": role, "value": text} for role, text in talk]
    speaking.write_json(folder / "data.json", [dict(image="a.png", conversations=turns), dict(conversations=turns[:2])])
    return folder


@pytest.mark.parametrize("template", [pytest.param(PLAIN, marks=pytest.mark.slow), CHAT], ids=["plain", "the folder's"])
def test_three_prompts_at_once_are_answered_by_the_export_as_by_the_run(template: str, tmp_path: Path) -> None:
    folder = base(tmp_path)
    (tmp_path / "run.gin").write_text(GIN.replace("TEMPLATE", template).replace("FOLDER", str(folder)))
    assert train.main([f"--gin_file={tmp_path / 'run.gin'}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert convert.main(["to_hf", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    out, end = tmp_path / "out", 2 if template == PLAIN else 4
    read: dict[str, Any] = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert read["generation_config.json"] == {"eos_token_id": end, "pad_token_id": 0}
    assert read["tokenizer_config.json"]["padding_side"] == "left" and "chat_template" not in str(read)
    assert not (out / "additional_chat_templates").exists() and "special_tokens_map.json" not in read
    run, exported, theirs = generate.load(tmp_path / "run"), generate.load(out), speaking.Theirs(out, "llava")
    asked = speaking.prompts(tmp_path, "llava")[1:]
    assert [exported.chat.encode(p, read_items(p, exported.chat.items)).tokens for p in asked] == [
        theirs.ids(prompt) for prompt in asked
    ]
    said = [answer.tokens for answer in run(asked, max_new_tokens=8)]
    assert said == theirs.answers(asked, 8) == [answer.tokens for answer in exported(asked, max_new_tokens=8)]
    assert exported.defaults == run.defaults
