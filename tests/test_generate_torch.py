"""What a model says is what transformers' `generate` says from the same folder, token by token.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from answering import folder, prompts
from hf_folders import llava, text, vision
from PIL import Image

from hetjax import convert, generate, train
from hetjax.data import Loader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NEW = 32
CASES = {
    "llama": text("llama"),
    "mistral with a window": text("mistral", sliding_window=5),
    "qwen2": text("qwen2", tie_word_embeddings=True),
    "qwen3": text("qwen3", head_dim=10),
    "mixtral": text("mixtral"),
    "qwen3_moe, a dense layer": text("qwen3_moe", mlp_only_layers=[0]),
    "clip + llama": llava(text("llama"), vision("clip")),
    "siglip + qwen3": llava(text("qwen3"), vision("siglip")),
    "clip + mixtral": llava(text("mixtral"), vision("clip")),
    "siglip + qwen3_moe": llava(text("qwen3_moe"), vision("siglip")),
}


def expected(directory: Path, asked: list[generate.Prompt], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids, at most `count` ids of the answer) of transformers, one prompt at a time."""
    config = json.loads((directory / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory, dtype=torch.float32).eval()
    whole = "vision_config" in config
    kind = transformers.AutoProcessor if whole else transformers.PreTrainedTokenizerFast  # Auto takes qwen2's for BPE
    processor = kind.from_pretrained(directory)
    ids, answers = [], []
    for prompt in asked:
        files = prompt.files.get("image", ())
        messages: list[Any] = [
            {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": turn}] if whole else turn}
            for n, turn in enumerate(prompt.turns)
        ]
        lacking = len(files) - sum(turn.count("<image>") for turn in prompt.turns)
        messages[0]["content"] = [{"type": "image"}] * lacking + messages[0]["content"] if whole else prompt.turns[0]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if whole:
            inputs = processor(text=text, images=[Image.open(f) for f in files] or None, return_tensors="pt")
        else:
            inputs = processor(text, add_special_tokens=False, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        start = inputs["input_ids"].shape[1]
        ids.append(inputs["input_ids"][0].tolist())
        answers.append(out[0, start:].tolist())
    return ids, answers


@pytest.mark.parametrize("case", list(CASES))
def test_greedy_answers_of_a_batch_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    directory = folder(tmp_path / "folder", CASES[case])
    asked = prompts(tmp_path, vision="vision_config" in CASES[case])
    model = generate.load(directory)
    ids, answers = expected(directory, asked, NEW)
    found = [model.chat.encode(p, generate.prompt.read_items(p, model.chat.items)).tokens for p in asked]
    assert found == ids
    said = model(asked, max_new_tokens=NEW)
    assert [a.tokens for a in said] == answers
    assert len(set(map(tuple, answers))) > 1
    sharded = generate.load(directory, tp=2, dp=2)
    assert [a.tokens for a in sharded(asked, max_new_tokens=NEW)] == answers


def test_an_exported_run_answers_in_transformers_as_the_run_does(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    changes = runs.settings(steps=12, log_every=12) | {"vit.ViT.feature_layer": -2}
    changes |= {"settings.DataConfig.template": runs.Reference("@settings.Template()")}
    changes |= {"settings.Template.human_prefix": "q1 so ", "settings.Template.human_suffix": "\n is "}
    assert train.main(runs.arguments(gin, tmp_path / "run", changes)) == 0
    assert convert.main(["to_hf", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    samples = list(Loader(runs.load(gin, changes).data, [runs.ITEM]).samples.values())
    files = lambda sample: {"image": tuple(str(tmp_path / "train" / name) for name in sample.files["vision"])}
    asked = [generate.Prompt(sample.turns[:-1], files(sample)) for sample in samples]
    asked.append(generate.ask("q0", image=str(tmp_path / "train" / samples[0].files["vision"][0])))
    ids, answers = expected(tmp_path / "out", asked, 12)
    run, exported = generate.load(tmp_path / "run"), generate.load(tmp_path / "out")
    image = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    spelled = lambda model, p: model.chat.encode(p, generate.prompt.read_items(p, model.chat.items)).tokens
    assert [spelled(exported, p) for p in asked] == ids
    for prompt, theirs in zip(asked, ids, strict=True):
        assert [t if u != image else image for t, u in zip(spelled(run, prompt), theirs, strict=True)] == theirs
    end = run.engine.stops[0]
    for model in (run, exported):
        said = model(asked, max_new_tokens=12)
        assert [[*a.tokens, end] if a.ended else a.tokens for a in said] == answers
        assert model.engine.stops == (end,) and any(a.ended for a in said)
