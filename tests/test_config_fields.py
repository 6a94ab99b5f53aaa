"""Every field of a config.json that transformers' code of a family looks at is read, refused, or known to change
nothing of what our models compute."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hf_folders import hearing, llava, qwen2_audio, text, vision, whisper

from hetjax.hf import read_config
from hetjax.hf.errors import ConvertError

FOUND = importlib.util.find_spec("transformers")
if FOUND is None or FOUND.origin is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
ROOT = Path(FOUND.origin).parent
LOOKS = re.compile(r"""\bconfig\.([a-z]\w*)(?!\w*\()|getattr\((?:self\.)?config, "([a-z]\w*)\"""")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
WINDOW = dict(use_sliding_window=True, max_window_layers=0, sliding_window=4)
# Files of transformers' code -> configs, in one of which each field that it looks at must be noticed
CASES: dict[str, Sequence[dict[str, Any]]] = {
    **{kind: [text(kind, **WINDOW)] for kind in DECODERS},
    "clip": [vision("clip")],
    "siglip": [vision("siglip")],
    "whisper": [whisper()],
    "llava": [llava(text("llama"), vision("clip"))],
    "qwen2_audio": [hearing(), qwen2_audio(text("qwen2"))],
}
NOTHING = {
    "how long texts may be, and tokens that end or fill them": "max_position_embeddings pad_token_id eos_token_id",
    "values before training": "initializer_range initializer_factor logit_scale_init_value",
    "applied in training alone, and told by name": "attention_dropout activation_dropout dropout encoder_layerdrop "
    "router_jitter_noise router_aux_loss_coef output_router_logits apply_spec_augment mask_feature_length "
    "mask_feature_min_masks mask_feature_prob mask_time_length mask_time_min_masks mask_time_prob",
    "of heads and of the other half of a pair": "num_labels id2label projection_dim projection_size vision_use_head "
    "classifier_proj_size use_weighted_layer_sum text_config vision_config vocab_size "
    "decoder_attention_heads decoder_ffn_dim decoder_layerdrop decoder_layers decoder_start_token_id n_positions "
    "max_target_positions is_encoder_decoder",
    "how it is computed, or what else is given back": "use_cache ignore_index",
    "of a mask that none of these families makes": "attention_chunk_size",
    "the token that stands for an item, for the export": "image_token_id audio_token_id",
}
IDLE = set(" ".join(NOTHING.values()).split())


def looked_at(kind: str, *shared: str) -> set[str]:
    """The fields that the modelling code of a family names."""
    files = [ROOT / "models" / kind / f"modeling_{kind}.py", *(ROOT / name for name in shared)]
    return {one or other for file in files for one, other in LOOKS.findall(file.read_text(encoding="utf-8"))}


def is_noticed(config: dict[str, Any], field: str) -> bool:
    """Whether an odd value is refused, or makes another model."""
    try:
        return read_config.read(config | {field: "odd"}, "x") != read_config.read(config, "x")
    except ConvertError:
        return True


@pytest.mark.parametrize("kind", CASES)
def test_no_field_that_transformers_looks_at_goes_unnoticed(kind: str) -> None:
    fields = looked_at(kind, *(("masking_utils.py",) if kind in DECODERS else ()))
    idle = IDLE | ({"sliding_window"} if kind == "llama" else set())  # which its code does not look at
    assert fields & IDLE and fields - IDLE, "the code is read"
    assert [f for f in sorted(fields - idle) if not any(is_noticed(config, f) for config in CASES[kind])] == []


def test_two_names_of_one_activation_are_one_model() -> None:
    plain = read_config.read(text("llama"), "x")
    assert read_config.read(text("llama", hidden_act="swish"), "x") == plain


def test_other_names_of_whispers_fields_are_read() -> None:
    other = whisper(num_attention_heads=2, hidden_size=16, num_hidden_layers=2)
    for field in ("encoder_attention_heads", "d_model", "encoder_layers"):
        del other[field]
    assert read_config.read(other, "x") == read_config.read(whisper(), "x")
