"""Tiny models of every family, one microbatch that each takes, and the same as transformers takes it.

Pictures and clips stand several in a sample, and one slot is empty; clips are of several lengths.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from hf_folders import AUDIO_TOKEN, IMAGE_TOKEN, hearing, llava, qwen2_audio, text, vision, whisper

Arrays = dict[str, np.ndarray]
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
TIED = dict(tie_word_embeddings=True)
DECODERS = {
    "llama": text("llama"),
    "llama, one kv head, wide heads": text("llama", num_key_value_heads=1, head_dim=12),
    "llama 3.1": text("llama", rope_theta=500000.0, rope_scaling=LLAMA3, **TIED),
    "llama, linear rope": text("llama", rope_scaling=dict(rope_type="linear", factor=4.0)),
    "mistral": text("mistral", num_key_value_heads=4),
    "mistral with a window": text("mistral", sliding_window=3),
    "qwen2, tied": text("qwen2", **TIED),
    "qwen2 with a window": text("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=0),
    "qwen3": text("qwen3", head_dim=10, rope_theta=1e6),
    "mixtral": text("mixtral"),
    "mixtral, one kv head, a window, tied": text("mixtral", num_key_value_heads=1, sliding_window=3, **TIED),
    "qwen3_moe": text("qwen3_moe", norm_topk_prob=True, head_dim=10),
    "qwen3_moe, dense layers": text("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1, 2], **TIED),
    "qwen2_moe": text("qwen2_moe", norm_topk_prob=True),
    "qwen2_moe, dense layers, tied": text("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1], **TIED),
    "dots1": text("dots1"),
    "dots1, one group, not renormalised, tied": text(
        "dots1", n_group=1, topk_group=1, norm_topk_prob=False, first_k_dense_replace=0, **TIED
    ),
}
SEEING = {
    "clip + mixtral": llava(text("mixtral"), vision("clip")),
    "siglip + qwen3_moe, every other layer": llava(
        text("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2), vision("siglip")
    ),
    "siglip + dots1": llava(text("dots1"), vision("siglip")),
    "clip + qwen2_moe": llava(text("qwen2_moe"), vision("clip")),
    "clip + llama": llava(text("llama"), vision("clip")),
    "clip + qwen3, last layer, class token": llava(
        text("qwen3"),
        vision("clip"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=5,
    ),
    "siglip + qwen2, tied": llava(text("qwen2", **TIED), vision("siglip")),
    "clip + qwen2": llava(text("qwen2"), vision("clip")),
    "siglip + qwen3": llava(text("qwen3"), vision("siglip")),
    "siglip + mixtral": llava(text("mixtral"), vision("siglip")),
    "clip + qwen3_moe": llava(text("qwen3_moe"), vision("clip")),
    "siglip + mistral, last layer": llava(text("mistral"), vision("siglip"), vision_feature_layer=-1),
    "clip + mistral, three layers": llava(text("mistral"), vision("clip"), vision_feature_layer=[-1, 0, 1]),
    "siglip + llama, two layers, without the first patch and biases": llava(
        text("llama"),
        vision("siglip"),
        vision_feature_layer=[-3, -2],
        vision_feature_select_strategy="default",
        multimodal_projector_bias=False,
        image_seq_length=3,
    ),
    "clip with pixels that fill no patch + llama 3.1, first layer": llava(
        text("llama", rope_scaling=LLAMA3), vision("clip", image_size=9), vision_feature_layer=1
    ),
}
HEARING = {
    "qwen2_audio": qwen2_audio(text("qwen2")),
    "qwen2_audio, tied": qwen2_audio(text("qwen2", **TIED)),
    "qwen2_audio of llama": qwen2_audio(text("llama")),
    "qwen2_audio of llama, tied": qwen2_audio(text("llama", **TIED)),
}
ENCODERS = {
    "clip": vision("clip"),
    "siglip": vision("siglip"),
    "siglip, pixels that fill no patch": vision("siglip", image_size=11),
    "whisper": whisper(),
    "whisper, the bare model": whisper(architectures=["WhisperModel"]),
    "qwen2_audio's encoder": hearing(),
}
ALL = DECODERS | SEEING | HEARING | ENCODERS

IN_SAMPLE = (0, 0, 1)  # the sample of each slot; the fourth is empty
FRAMES = (16, 13, 6, 0)  # of each slot's clip
LENGTH = 18  # tokens of a sample


def microbatch(models: Mapping[str, Any]) -> Arrays:
    """What a decoder with or without an encoder, or an encoder alone, takes: two samples, or all slots full."""
    tower = next((n for n in models if n != "llm"), None)
    slots = {} if tower is None else _slots(tower, models[tower])
    if "llm" not in models:
        return {name: values[:3] for name, values in slots.items()} | _whole_clips(slots)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, AUDIO_TOKEN, (2, LENGTH)).astype(np.int32)
    index = np.full_like(tokens, -1)
    place = [1, 1]
    for slot, sample in enumerate(IN_SAMPLE if tower else ()):
        model = models[tower]
        rows = model.rows if tower == "vision" else model.rows_of(FRAMES[slot])
        at = slice(place[sample], place[sample] + rows)
        tokens[sample, at] = IMAGE_TOKEN if tower == "vision" else AUDIO_TOKEN
        index[sample, at] = slot * model.rows + np.arange(rows)
        place[sample] += rows + 2
    weights = np.roll(index < 0, -1, 1).astype(np.float32)
    weights[:, -1] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    found = dict(tokens=tokens, positions=positions, segment_ids=np.ones_like(tokens), weights=weights)
    found["targets"] = np.roll(tokens, -1, 1)
    return found | slots | ({f"{tower}.index": index} if tower else {})


def _slots(tower: str, model: Any) -> Arrays:
    rng = np.random.default_rng(1)
    if tower == "vision":
        pixels = rng.normal(size=(4, model.image_size, model.image_size, 3)).astype(np.float32)
        pixels[3] = 0
        return {"vision.pixels": pixels}
    mel = rng.normal(size=(4, model.context, model.num_mels)).astype(np.float32)
    return {"audio.mel": mel, "audio.frames": np.array(FRAMES, np.int32)}


def _whole_clips(slots: Arrays) -> Arrays:
    return {"audio.frames": np.full(3, FRAMES[0], np.int32)} if "audio.frames" in slots else {}


def with_item_token(made: Arrays, token: int) -> Arrays:
    """The microbatch of a model whose pictures or clips stand at `token`, above all tokens of text."""
    (index,) = (values for name, values in made.items() if name.endswith(".index"))
    tokens = np.where(index >= 0, token, made["tokens"] % token)
    return made | dict(tokens=tokens, targets=np.roll(tokens, -1, 1))


def for_transformers(made: Arrays) -> Arrays:
    """The same as transformers' model of the family takes it, which knows no empty slot."""
    found: Arrays = {}
    if "vision.pixels" in made:
        found["pixel_values"] = made["vision.pixels"][:3].transpose(0, 3, 1, 2)
    if "audio.mel" in made:
        found["input_features"] = made["audio.mel"][:3].transpose(0, 2, 1)
    if "tokens" not in made:
        return found
    if "audio.mel" in made:
        heard = np.arange(made["audio.mel"].shape[1]) < made["audio.frames"][:3, None]
        found["feature_attention_mask"] = heard.astype(np.int64)
    tokens = made["tokens"].astype(np.int64)
    learned = np.roll(made["weights"], 1, 1) > 0  # a label is what the token before it is to say
    return found | dict(input_ids=tokens, attention_mask=np.ones_like(tokens), labels=np.where(learned, tokens, -100))
