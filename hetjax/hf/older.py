"""Files that transformers 5 writes beside the weights, in the form that 4.57 reads as well.

Version 5 nests the picture or sound processor in processor_config.json, and names classes that 4.57 does not have.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetjax.hf import pictures
from hetjax.hf.source import read_json

TOKENIZER = "tokenizer_config.json"
INNER = ("image_processor", "feature_extractor")  # of processor_config.json
KIND = "image_processor_type"


def rewritten(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Those of `files` that 4.57 would refuse or not find, as it reads them; the others are good as they are."""
    found: dict[str, dict[str, Any]] = {}
    if TOKENIZER in files:
        found[TOKENIZER] = _tokenizer(read_json(files[TOKENIZER]))
    if pictures.NESTED in files:
        outer = read_json(files[pictures.NESTED])
        inner = [outer.pop(name) for name in INNER if name in outer]
        found[pictures.NESTED] = outer
        if inner and pictures.FILE not in files:
            common = {"processor_class": outer["processor_class"]} if "processor_class" in outer else {}
            found[pictures.FILE] = _processor(inner[0]) | common
    return {name: value for name, value in found.items() if name not in files or value != read_json(files[name])}


def _tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    if KIND in config:
        config |= {KIND: pictures.plain_name(config[KIND])}
    return config
