"""Tiny Hugging Face folders that answer, with a tokenizer of words, a chat template, a picture processor; prompts."""

import json
from pathlib import Path
from typing import Any

import hf_folders
import numpy as np
from hf_folders import IMAGE_TOKEN
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hetjax import generate

CHAT = (
    "{% for m in messages %}w1 {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    " w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)


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
    values = json.loads((directory / "config.json").read_text())
    for inner in (values, values.get("text_config", {})):
        inner |= dict(eos_token_id=None, bos_token_id=None, max_position_embeddings=256)
    (directory / "config.json").write_text(json.dumps(values))
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
