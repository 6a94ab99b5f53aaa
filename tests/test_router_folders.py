"""Losses of routers in folders: read where transformers adds them, told by exports, and no part of what must agree."""

import dataclasses
from pathlib import Path
from typing import Any

import hf_folders
import pytest
from hf_folders import llava, text, vision

from hetjax.core.graph import Module, vlm
from hetjax.core.layout import Layout
from hetjax.hf import initial, pretrained, read_config, write_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.parts import Parts
from models.decoder import Decoder

PLAIN = dict(output_router_logits=False, router_aux_loss_coef=0.02)
ADDED = dict(output_router_logits=True, router_aux_loss_coef=0.02)
FAMILIES = ("mixtral", "qwen3_moe")


def with_losses(model: Decoder, **losses: float) -> Decoder:
    assert model.experts is not None
    return dataclasses.replace(model, experts=dataclasses.replace(model.experts, **losses))


def exported(config: dict[str, Any], **losses: float) -> dict[str, Any]:
    """config.json of a run that began with `config` and had these losses."""
    parts = read_config.read(config, "config.json")
    assert parts.llm is not None
    parts = dataclasses.replace(parts, llm=with_losses(parts.llm, **losses))
    return write_config.write(parts, dtype="float32", item_token=7, sources=dict.fromkeys(parts.models, config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("fields", "weight"), [(PLAIN, 0.0), (ADDED, 0.02), (dict(output_router_logits=True), 0.001)])
def test_the_weight_is_read_where_transformers_adds_the_loss(
    family: str, fields: dict[str, Any], weight: float
) -> None:
    model = read_config.read(text(family, **fields), "config.json").llm
    assert model is not None and model.experts is not None and model.experts.balance_loss == weight


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_tells_the_runs_loss_and_keeps_all_else(family: str) -> None:
    as_written = dict(dtype="float32", torch_dtype="float32")
    for began, losses, told in (
        (PLAIN, dict(balance_loss=0.5, z_loss=0.1), dict(output_router_logits=True, router_aux_loss_coef=0.5)),
        (PLAIN, dict(z_loss=0.1), PLAIN),
        (ADDED, dict(balance_loss=0.02), ADDED),
        (ADDED, dict(balance_loss=0.0), PLAIN),
    ):
        config = text(family, bos_token_id=5, **began)
        assert exported(config, **losses) == config | as_written | told
    whole = llava(text(family, bos_token_id=5, **PLAIN), vision("siglip"))
    written = exported(whole, balance_loss=0.5)["text_config"]
    told = dict(output_router_logits=True, router_aux_loss_coef=0.5)
    assert written | as_written == whole["text_config"] | told | as_written | {"tie_word_embeddings": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_without_a_folder_tells_it_too(family: str) -> None:
    model = read_config.read(text(family), "config.json").llm
    assert model is not None
    config = write_config.write(Parts(llm=with_losses(model, balance_loss=0.5, z_loss=0.1)), dtype="float32")
    assert read_config.read(config, "config.json") == Parts(llm=with_losses(model, balance_loss=0.5))


def test_a_run_starts_from_a_folder_with_other_losses_but_with_no_other_experts(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", text("mixtral", **ADDED))
    model = pretrained.decoder(str(folder), balance_loss=0.5, z_loss=0.1)
    assert model == with_losses(pretrained.decoder(str(folder)), balance_loss=0.5, z_loss=0.1)
    start(model, folder)
    assert model.experts is not None
    other = dataclasses.replace(model, experts=dataclasses.replace(model.experts, per_token=1))
    with pytest.raises(ConvertError, match=r"Decoder\.experts"):
        start(other, folder)


def start(model: Decoder, folder: Path) -> None:
    initial.open_starts(vlm((), Module("llm", model.module("float32"), Layout())), {"llm": str(folder)})


def test_losses_of_a_decoder_without_experts_are_refused(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", text("llama"))
    with pytest.raises(ConvertError, match=r"pretrained\.decoder\.z_loss is set, and .* has no experts; leave it out"):
        pretrained.decoder(str(folder), z_loss=0.1)
