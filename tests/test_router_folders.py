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


def with_losses(model: Decoder, **losses: Any) -> Decoder:
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


def test_a_bias_moves_in_a_run_that_says_so_and_no_folder_tells_its_rate(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", text("dots1", bos_token_id=5))
    still, moving = pretrained.decoder(str(folder)), pretrained.decoder(str(folder), bias_rate=0.001)
    assert still.experts is not None and moving == with_losses(still, bias_rate=0.001)
    assert (still.experts.selection_bias, still.experts.bias_rate, still.experts.shared_width) == (True, 0.0, 24)
    start(moving, folder)
    config = text("dots1", bos_token_id=5)
    assert exported(config, bias_rate=0.001) == config | dict(dtype="float32", torch_dtype="float32")
    written = write_config.write(Parts(llm=moving), dtype="float32")
    assert read_config.read(written, "config.json") == Parts(llm=still)
    with pytest.raises(ValueError, match=r"Experts\.bias_rate=0\.1 moves no bias"):
        pretrained.decoder(str(hf_folders.write(tmp_path / "plain", text("mixtral"))), bias_rate=0.1)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", dict(selection_bias=True), "Experts.selection_bias=True: Qwen3-MoE, .* computes False alone"),
        ("qwen3_moe", dict(shared_width=8), "Experts.shared_width=8: Qwen3-MoE"),
        ("mixtral", dict(scale=2.0), "Experts.scale=2.0: Mixtral"),
        ("qwen2_moe", dict(shared_gate=False), "Experts.shared_gate=False: Qwen2-MoE"),
        ("dots1", dict(selection_bias=False), "Experts.selection_bias=False: dots1"),
        ("dots1", dict(dense_layers=(1,)), r"Experts.dense_layers=\(1,\): dots1"),
        ("dots1", dict(shared_width=8), "Experts.shared_width=8: of dots1 it is a multiple of width=12"),
    ],
)
def test_a_mixture_that_no_class_computes_is_refused_by_name(
    family: str, changes: dict[str, Any], message: str
) -> None:
    model = read_config.read(text(family), "config.json").llm
    assert model is not None
    with pytest.raises(ConvertError, match=message):
        write_config.write(Parts(llm=with_losses(model, **changes)), dtype="float32")


@pytest.mark.parametrize("name", ["n_routed_experts", "n_shared_experts", "num_experts_per_tok"])
def test_a_dots1_without_a_size_is_refused(name: str) -> None:
    with pytest.raises(ConvertError, match=f"{name}=None: a dots1 needs at least 1"):
        read_config.read(text("dots1", **{name: None}), "config.json")


def start(model: Decoder, folder: Path) -> None:
    initial.open_starts(vlm((), Module("llm", model.module("float32"), Layout())), {"llm": str(folder)})


def test_losses_of_a_decoder_without_experts_are_refused(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", text("llama"))
    with pytest.raises(ConvertError, match=r"pretrained\.decoder\.z_loss is set, and .* has no experts; leave it out"):
        pretrained.decoder(str(folder), z_loss=0.1)
