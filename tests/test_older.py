"""What transformers 5 writes beside the weights leaves in a form that 4.57 opens; what 4.57 wrote leaves as it is."""

import json
from pathlib import Path
from typing import Any

from hetjax.hf import older

PICTURES = {"image_processor_type": "CLIPImageProcessorPil", "size": {"shortest_edge": 8}, "do_resize": True}
FIVE: dict[str, Any] = {
    "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<image>"]},
    "processor_config.json": {"processor_class": "LlavaProcessor", "image_processor": PICTURES, "patch_size": 4},
}
FOUR: dict[str, Any] = {
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image": "<i>"}},
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}},
    "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": 4},
}


def write(directory: Path, files: dict[str, Any]) -> dict[str, Path]:
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value))
    return {name: directory / name for name in files}


def test_files_of_transformers_5_are_rewritten_for_4(tmp_path: Path) -> None:
    assert older.rewritten(write(tmp_path, FIVE)) == {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": ["<image>"],
        },
        "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": 4},
        "preprocessor_config.json": PICTURES
        | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
    }


def test_files_that_4_reads_stay_byte_for_byte(tmp_path: Path) -> None:
    assert older.rewritten(write(tmp_path, FOUR)) == {}
