"""One fact that a folder tells in two places is read as the version of transformers that wrote it reads it.

Where nothing tells the version, it is that of version 5; what it makes of the same config.json is asked of it.
"""

import json
from pathlib import Path
from typing import Any

import hf_folders
import pytest
from hf_folders import llava, qwen2_audio, text, vision
from safetensors.numpy import save_file

from hetjax import convert
from hetjax.hf import processor, read_config, write_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.source import Extras
from hetjax.hf.stored import open_source
from hetjax.run.experiment import Encoder
from models.vit import ViT

FOUR = {"transformers_version": "4.57.1"}
FIVE = {"transformers_version": "5.23.0"}
HEAD = "language_model.lm_head.weight"


def theirs(config: dict[str, Any], directory: Path) -> Any:
    """transformers' own reading."""
    transformers = pytest.importorskip("transformers")
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(directory)


def pair(top: bool | None, inside: bool | None, version: dict[str, str]) -> dict[str, Any]:
    """A LLaVA that tells of ties at the top and in text_config; None: not there."""
    config = llava(text("llama"), vision("siglip"), vision_feature_layer=-1) | version
    for where, value in ((config, top), (config["text_config"], inside)):
        where["tie_word_embeddings"] = value
        if value is None:
            del where["tie_word_embeddings"]
    return config


TIES = [(top, inside) for top in (True, False, None) for inside in (True, False, None)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("top", "inside"), TIES)
def test_version_5_ties_where_one_of_the_two_says_so(top: bool | None, inside: bool | None, tmp_path: Path) -> None:
    for version in ({}, FIVE):
        config = pair(top, inside, version)
        llm = read_config.read(config, "config.json").llm
        assert llm is not None and llm.tied == theirs(config, tmp_path).tie_word_embeddings == bool(top or inside)


@pytest.mark.parametrize(("top", "inside"), TIES)
def test_version_4_ties_as_text_config_says(top: bool | None, inside: bool | None) -> None:
    llm = read_config.read(pair(top, inside, FOUR), "config.json").llm
    assert llm is not None and llm.tied == bool(top if inside is None else inside)


@pytest.mark.parametrize("head", ["none", "equal"])
def test_a_folder_tied_at_the_top_alone_opens_tied_and_is_exported_tied_for_both_versions(
    head: str, tmp_path: Path
) -> None:
    told = pair(True, True, FIVE)
    folder = hf_folders.write(tmp_path / "hf", told)
    (folder / "config.json").write_text(json.dumps(pair(True, False, FIVE)))
    tensors = hf_folders.read(folder)
    if head == "equal":
        save_file(
            tensors | {HEAD: tensors[HEAD.replace("lm_head", "model.embed_tokens")]}, folder / "model.safetensors"
        )
    assert open_source(folder).models["llm"].tied
    assert convert.main(["to_hf", str(folder), "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    assert not list(hf_folders.differing(hf_folders.read(tmp_path / "out"), tensors))


@pytest.mark.parametrize(
    ("top", "inside", "version", "field"),
    [
        (True, False, FIVE, "tie_word_embeddings=True"),
        (False, True, FIVE, "text_config.tie_word_embeddings=True"),
        (False, True, FOUR, "text_config.tie_word_embeddings=True"),
        (True, None, FOUR, "tie_word_embeddings=True"),
    ],
)
def test_an_error_names_the_field_that_was_read(
    top: bool | None, inside: bool | None, version: dict[str, str], field: str, tmp_path: Path
) -> None:
    folder = hf_folders.write(tmp_path / "hf", pair(False, False, version))
    (folder / "config.json").write_text(json.dumps(pair(top, inside, version)))
    with pytest.raises(ConvertError, match=f": {field}, but .*lm_head.weight differs from the embedding"):
        open_source(folder)


def test_the_way_out_of_a_tie_with_another_head_takes_the_head(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", pair(False, False, FIVE))
    (folder / "config.json").write_text(json.dumps(pair(True, True, FIVE)))
    with pytest.raises(ConvertError, match=r"set each tie_word_embeddings in config\.json to false to take the"):
        open_source(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    assert not open_source(folder).models["llm"].tied


@pytest.mark.parametrize(
    ("version", "field"), [(FIVE, "tie_word_embeddings"), (FOUR, "text_config.tie_word_embeddings")]
)
def test_a_missing_head_names_the_field_to_set(version: dict[str, str], field: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", pair(True, True, version))
    (folder / "config.json").write_text(json.dumps(pair(False, False, version)))
    with pytest.raises(ConvertError, match=f"lm_head.weight is missing .*; set {field}=true if"):
        open_source(folder)
    changed = pair(False, False, version)
    place = changed["text_config"] if "." in field else changed
    place["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(changed))
    assert open_source(folder).models["llm"].tied


def test_qwen2_audio_is_tied_by_its_text_config_alone() -> None:
    config = qwen2_audio(text("qwen2")) | {"tie_word_embeddings": True}
    for version in (FOUR, FIVE):
        llm = read_config.read(config | version, "config.json").llm
        assert llm is not None and not llm.tied


@pytest.mark.filterwarnings("ignore")
def test_of_two_configs_of_a_clip_tower_the_older_field_counts_as_a_whole_and_is_named(tmp_path: Path) -> None:
    outside = vision("clip") | dict(image_size=16, num_hidden_layers=5)
    config = dict(model_type="clip", vision_config=outside, vision_config_dict=dict(image_size=64, hidden_size=96))
    tower, wanted = read_config.read(config, "config.json").vision, theirs(config, tmp_path).vision_config
    assert tower is not None
    ours = (tower.image_size, tower.width, tower.num_layers, tower.patch_size)
    assert ours == (64, 96, 12, 32)
    assert ours == (wanted.image_size, wanted.hidden_size, wanted.num_hidden_layers, wanted.patch_size)
    config["vision_config_dict"] = dict(hidden_act="gelu")
    with pytest.raises(ConvertError, match=r"config\.json: vision_config_dict: hidden_act='gelu': only"):
        read_config.read(config, "config.json")


LINEAR = dict(rope_type="linear", factor=2.0)
ROPES: dict[str, dict[str, Any]] = {
    "both thetas": dict(rope_theta=5.0, rope_parameters=dict(rope_type="default", rope_theta=9.0)),
    "both scalings": dict(
        rope_theta=5.0, rope_scaling=LINEAR, rope_parameters=dict(rope_type="default", rope_theta=9.0)
    ),
    "theta outside": dict(rope_theta=5.0, rope_parameters=dict(rope_type="default")),
    "theta inside the old field": dict(rope_theta=5.0, rope_scaling=dict(LINEAR, rope_theta=7.0)),
    "two names of the type": dict(rope_scaling=dict(type="yarn", **LINEAR)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(ROPES))
def test_rotary_settings_are_those_that_version_5_takes_and_the_export_says_them_once(
    case: str, tmp_path: Path
) -> None:
    config = {k: v for k, v in text("llama").items() if not k.startswith("rope_")} | ROPES[case]
    for whole in (config, llava(config, vision("clip"))):
        parts = read_config.read(whole, "config.json")
        wanted = getattr(theirs(whole, tmp_path), "text_config", None) or theirs(whole, tmp_path)
        assert parts.llm is not None
        scaling = parts.llm.rope_scaling
        assert parts.llm.rope_theta == wanted.rope_parameters["rope_theta"]
        assert ("default" if scaling is None else scaling.kind) == wanted.rope_parameters["rope_type"]
        made = write_config.write(parts, dtype="float32", sources=dict.fromkeys(("llm", "vision"), whole))
        again = made.get("text_config", made)
        assert read_config.read(made, "made") == parts and "rope_parameters" not in again
        assert getattr(theirs(made, tmp_path), "text_config", theirs(made, tmp_path)).rope_parameters[
            "rope_theta"
        ] == pytest.approx(parts.llm.rope_theta)


def test_rotary_settings_that_version_4_did_not_read_do_not_count_in_what_it_wrote() -> None:
    config = text("llama", rope_theta=5.0, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=9.0))
    for whole in (config | FOUR, llava(config, vision("clip")) | FOUR):
        parts = read_config.read(whole, "config.json")
        assert parts.llm is not None and (parts.llm.rope_theta, parts.llm.rope_scaling) == (5.0, None)
        made = write_config.write(parts, dtype="float32", sources=dict.fromkeys(("llm", "vision"), whole))
        assert read_config.read(made, "made") == parts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_of_two_ids_of_a_picture_s_or_clip_s_token_the_one_that_transformers_takes_is_read(
    kind: str, tmp_path: Path
) -> None:
    whole = llava(text("llama"), vision("clip")) if kind == "image" else qwen2_audio(text("llama"))
    config = whole | {f"{kind}_token_index": 7, f"{kind}_token_id": 9}
    assert processor.item_token(Extras(config), kind) == 9 == getattr(theirs(config, tmp_path), f"{kind}_token_index")


def test_a_precision_inside_does_not_contradict_the_one_outside(tmp_path: Path) -> None:
    config = llava(text("llama", torch_dtype="float16"), vision("clip", dtype="float16"))
    folder = hf_folders.write(tmp_path / "hf", config)
    assert convert.main(["to_hf", str(folder), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert {made["dtype"], made["torch_dtype"], made["text_config"]["torch_dtype"]} == {"bfloat16"}
    assert made["vision_config"]["dtype"] == "bfloat16" and "torch_dtype" not in made["vision_config"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (text("llama"), "vocab_size"),
        (llava(text("llama"), vision("clip")), "text_config.vocab_size"),
    ],
    ids=["alone", "inside"],
)
def test_a_vocabulary_of_another_size_than_the_embedding_names_its_field(
    config: dict[str, Any], field: str, tmp_path: Path
) -> None:
    folder = hf_folders.write(tmp_path / "hf", config)
    changed = json.loads((folder / "config.json").read_text()) | {"vocab_size": 50}  # read in a decoder alone
    if "." in field:
        changed["text_config"]["vocab_size"] = 51
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(
        ConvertError, match=rf"embed_tokens.weight has shape \[48, 32\], config.json \({field}\) makes it"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    "change", ["none", "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token"]
)
def test_a_folder_s_processor_that_counts_other_tokens_than_the_tower_has_rows_is_not_given_back(
    change: str, tmp_path: Path
) -> None:
    encoder = Encoder(ViT(8, 4, 16, 2, 2, 24, 32, "clip", select="default"))
    llava_family = registry.WHOLE_OF_KIND["llava"]
    made = llava_family.processor(encoder)
    if change != "none":
        made["processor_config.json"][change] = None if change == "patch_size" else "full"
    files = {name: tmp_path / name for name in made}
    for name, path in files.items():
        path.write_text(json.dumps(made[name]))
    assert llava_family.serves(encoder, files) == (change == "none")
