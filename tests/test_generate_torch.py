"""What a model says is what transformers' `generate` says from the same folder, token by token.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import json
from pathlib import Path

import pytest
from answering import folder, prompts
from hf_folders import llava, text, vision
from PIL import Image

from hetjax import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NEW = 32
CASES = {
    "llama": text("llama"),
    "mistral with a window": text("mistral", sliding_window=5),
    "qwen2": text("qwen2", tie_word_embeddings=True),
    "qwen3": text("qwen3", head_dim=10),
    "clip + llama": llava(text("llama"), vision("clip")),
    "siglip + qwen3": llava(text("qwen3"), vision("siglip")),
}


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
