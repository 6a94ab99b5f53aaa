"""What a model says is what transformers' `generate` says from the same folder, token by token.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from pathlib import Path
from typing import Any

import hf_folders
import numpy as np
import pytest
from hf_folders import IMAGE_TOKEN, llava, text, vision
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hetjax import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NEW = 32
CHAT = (
    "{% for m in messages %}w1 {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    " w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)
CASES = {
    "llama": text("llama"),
    "mistral with a window": text("mistral", sliding_window=5),
    "qwen2": text("qwen2", tie_word_embeddings=True),
    "qwen3": text("qwen3", head_dim=10),
    "clip + llama": llava(text("llama"), vision("clip")),
    "siglip + qwen3": llava(text("qwen3"), vision("siglip")),
}


def folder(directory: Path, config: dict[str, Any]) -> Path:
    """A folder of random weights that never ends an answer, with tokenizer, template and processor."""
    hf_folders.write(directory, config)
    words = [f"w{n}" for n in range(IMAGE_TOKEN - 2)] + ["user", "assistant", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT)
    (directory / "generation_config.json").write_text("{}")
    if "vision_config" in config:
        size, clip = config["vision_config"]["image_size"], config["vision_config"]["model_type"].startswith("clip")
        kind = dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": size}, crop_size=size)
        plain = dict(image_processor_type="SiglipImageProcessor", size={"height": size, "width": size})
        common = dict(image_mean=[0.48, 0.45, 0.40], image_std=[0.26, 0.25, 0.27], resample=3, do_convert_rgb=True)
        crop = dict(do_center_crop=True) if clip else {}
        settings = (kind if clip else plain) | common | crop | dict(processor_class="LlavaProcessor")
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
        own = dict(
            processor_class="LlavaProcessor",
            image_token="<image>",
            patch_size=config["vision_config"]["patch_size"],
            vision_feature_select_strategy=config["vision_feature_select_strategy"],
            num_additional_image_tokens=int(clip),
        )
        (directory / "processor_config.json").write_text(json.dumps(own))
    for name in ("config.json",):
        values = json.loads((directory / name).read_text())
        for inner in (values, values.get("text_config", {})):
            inner |= dict(eos_token_id=None, bos_token_id=None, max_position_embeddings=256)
        (directory / name).write_text(json.dumps(values))
    return directory


def picture(path: Path, seed: int) -> str:
    size = (13, 9) if seed % 2 else (9, 20)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return str(path)


def prompts(directory: Path, *, vision: bool) -> list[generate.Prompt]:
    """Of different lengths, with none, one and two pictures."""
    if not vision:
        return [generate.ask(" ".join(f"w{3 + 7 * i % 40}" for i in range(n))) for n in (1, 9, 4, 6)]
    a, b, c = (picture(directory / f"{n}.png", n) for n in range(3))
    return [
        generate.ask("w5 <image> w6 <image> w7", image=[a, b]),
        generate.ask("w8 w9"),
        generate.ask("what is w3 w4 w5 w6 w7", image=c),
    ]


def expected(directory: Path, asked: list[generate.Prompt], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids, answer ids) of transformers, one prompt at a time."""
    config = json.loads((directory / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory, dtype=torch.float32).eval()
    whole = "vision_config" in config
    kind = transformers.AutoProcessor if whole else transformers.PreTrainedTokenizerFast  # Auto takes qwen2's for BPE
    processor = kind.from_pretrained(directory)
    ids, answers = [], []
    for prompt in asked:
        content = prompt.turns[0]
        files = prompt.files.get("image", ())
        if whole:
            lacking = len(files) - content.count("<image>")
            content = [{"type": "image"}] * lacking + [{"type": "text", "text": content}]
        messages = [{"role": "user", "content": content}]
        if whole:
            shown = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=shown, images=[Image.open(f) for f in files] or None, return_tensors="pt")
        else:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
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
