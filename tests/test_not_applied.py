"""Fields of config.json that change no parameter and no evaluation are read, named where training starts, and kept."""

import json
import logging
from pathlib import Path
from typing import Any

import hf_folders
import pytest
from hf_folders import hearing, llava, qwen2_audio, text, vision, whisper

from hetjax import convert
from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.hf import initial, read_config
from hetjax.hf.stored import open_source

NOISE = dict(dropout=0.1, attention_dropout=0.2, activation_dropout=0.3, encoder_layerdrop=0.4)
IDLE = dict(use_cache=False, initializer_range=0.5, pretraining_tp=2, gradient_checkpointing=True)
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "llama": (text("llama", attention_dropout=0.1, **IDLE), {"llm": "attention_dropout=0.1"}),
    "llama, nothing": (text("llama", attention_dropout=0.0, dropout=0.1, **IDLE), {"llm": ""}),
    "mixtral": (
        text("mixtral", router_jitter_noise=0.1, router_aux_loss_coef=0.02),
        {"llm": "router_jitter_noise=0.1"},
    ),
    "qwen3_moe with its router's loss": (
        text("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.02, router_jitter_noise=0.1),
        {"llm": ""},
    ),
    "siglip": (vision("siglip", attention_dropout=0.5, dropout=0.5), {"vision": "attention_dropout=0.5"}),
    "whisper": (
        whisper(apply_spec_augment=True, decoder_layerdrop=0.5, **NOISE),
        {"audio": ", ".join(f"{n}={v}" for n, v in (NOISE | dict(apply_spec_augment=True)).items())},
    ),
    "whisper that masks nothing": (whisper(apply_spec_augment=True, mask_time_prob=0.0), {"audio": ""}),
    "qwen2_audio": (
        qwen2_audio(text("qwen2", attention_dropout=0.1), audio_config=hearing(encoder_layerdrop=0.4)),
        {"llm": "text_config.attention_dropout=0.1", "audio": "audio_config.encoder_layerdrop=0.4"},
    ),
    "llava": (
        llava(text("llama", attention_dropout=0.1), vision("clip", attention_dropout=0.2)),
        {"llm": "text_config.attention_dropout=0.1", "vision": "vision_config.attention_dropout=0.2"},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_such_fields_are_read_named_by_their_place_and_kept(case: str, tmp_path: Path) -> None:
    config, named = CASES[case]
    assert {part: read_config.unapplied(config, part) for part in named} == named
    folder = hf_folders.write(tmp_path / "hf", config)
    for command, source, out in (("from_hf", "hf", "ckpt"), ("to_hf", "ckpt", "out")):
        assert convert.main([command, str(tmp_path / source), "--out", str(tmp_path / out)]) == 0
    before, after = (json.loads((d / "config.json").read_text()) for d in (folder, tmp_path / "out"))
    assert after == before


def test_a_part_that_is_exported_alone_keeps_them(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", CASES["qwen2_audio"][0])
    for module, field in (("llm", "attention_dropout"), ("audio", "encoder_layerdrop")):
        out = tmp_path / module
        assert convert.main(["to_hf", str(folder), "--out", str(out), "--modules", module]) == 0
        assert json.loads((out / "config.json").read_text())[field] > 0


def test_training_names_them_in_one_line_for_each_module(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = hf_folders.write(tmp_path / "hf", CASES["llava"][0])
    models = open_source(folder).models
    tower = Module("vision", models["vision"].module("float32"), Layout())
    graph = vlm((tower,), Module("llm", models["llm"].module("float32", encoders=("vision",)), Layout()))
    with caplog.at_level(logging.WARNING):
        initial.open_starts(graph, dict.fromkeys(("llm", "vision"), str(folder)))
    assert sorted(caplog.messages) == [
        f"llm: not applied in training: text_config.attention_dropout=0.1 ({folder}); exports keep it",
        f"vision: not applied in training: vision_config.attention_dropout=0.2 ({folder}); exports keep it",
    ]
