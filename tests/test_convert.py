"""Hugging Face folders come in and go out with the same bytes; under any layout; what is broken is refused by name."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_folders
import jax
import ml_dtypes
import numpy as np
import pytest
import runs
from hf_folders import hearing, llava, qwen2_audio, text, vision, whisper
from safetensors.numpy import load_file, save_file

from hetjax import convert, train
from hetjax.core.graph import Graph, Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from hetjax.hf import initial, pieces, read_config, tensors, write_config
from hetjax.hf.families import registry
from hetjax.hf.parts import Parts
from hetjax.hf.pattern import parse
from hetjax.hf.stored import open_source
from models.decoder import Decoder
from models.moe import Experts
from models.vit import ViT

TIED = dict(tie_word_embeddings=True)
BF16 = ml_dtypes.bfloat16
FAMILIES = {
    "llama": (text("llama"), np.float32),
    "llama, tied, wide heads": (text("llama", head_dim=12, num_key_value_heads=1, **TIED), BF16),
    "mistral": (text("mistral", sliding_window=7), np.float16),
    "qwen2": (text("qwen2"), BF16),
    "qwen3": (text("qwen3"), np.float32),
    "mixtral": (text("mixtral", sliding_window=5), BF16),
    "qwen2_moe": (text("qwen2_moe"), BF16),
    "dots1": (text("dots1"), np.float32),
    "qwen3_moe, dense layers, tied": (
        text("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1], norm_topk_prob=True, **TIED),
        np.float32,
    ),
    "clip": (vision("clip"), np.float32),
    "siglip": (vision("siglip"), np.float32),
    "whisper": (whisper(d_model=32), np.float16),
    "whisper, the bare model": (whisper(architectures=["WhisperModel"], encoder_layers=1), np.float32),
    "qwen2-audio's encoder": (hearing(), np.float32),
    "qwen2-audio": (qwen2_audio(text("qwen2")), BF16),
    "clip + llama": (llava(text("llama"), vision("clip")), np.float32),
    "clip + qwen2, tied": (llava(text("qwen2", **TIED), vision("clip"), vision_feature_layer=-1), np.float64),
    "siglip + mistral": (llava(text("mistral"), vision("siglip"), vision_feature_layer=-3), np.float32),
    "siglip + llama, embeddings": (llava(text("llama"), vision("siglip"), vision_feature_layer=0), np.float32),
    "clip + llama, two layers": (
        llava(text("llama"), vision("clip"), vision_feature_layer=[1, -2], multimodal_projector_bias=False),
        BF16,
    ),
    "siglip + qwen3": (llava(text("qwen3"), vision("siglip")), BF16),
    "siglip + qwen3_moe": (llava(text("qwen3_moe", decoder_sparse_step=2), vision("siglip")), np.float16),
}
CLIP_LLAMA = FAMILIES["clip + llama"][0]


def run(*arguments: object) -> int:
    return convert.main([str(a) for a in arguments])


def test_every_family_is_among_those_that_go_in_and_out() -> None:
    tried = {config["model_type"] for config, _ in FAMILIES.values()}
    assert tried == {*registry.OF_KIND, *registry.WHOLE_OF_KIND}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folder_goes_through_a_checkpoint_byte_by_byte(family: str, tmp_path: Path) -> None:
    config, dtype = FAMILIES[family]
    folder = hf_folders.write(tmp_path / "folder", config, dtype=dtype, shards=1 + family.count("+"))
    assert run("from_hf", folder, "--out", tmp_path / "ckpt") == 0
    shutil.move(folder, tmp_path / "away")  # the checkpoint needs nothing else
    assert run("to_hf", tmp_path / "ckpt", "--out", tmp_path / "out", "--max_shard_size", "20KB") == 0
    ours, theirs = hf_folders.read(tmp_path / "out"), hf_folders.read(tmp_path / "away")
    assert not list(hf_folders.differing(ours, theirs))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "away/config.json").read_text()
    )
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "away" / name).read_bytes()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 1
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in theirs.values())
    assert max(sum(a.nbytes for a in load_file(tmp_path / "out" / f).values()) for f in files) <= 20_000


def in_memory(key: str) -> str:
    """As a state dict of transformers 5 spells a key of a vision-language model."""
    key = key.replace("vision_model.", "").replace("language_model.model.", "language_model.")
    return "lm_head.weight" if key.endswith("lm_head.weight") else f"model.{key}"


@pytest.mark.parametrize("renamed", [lambda k: k.replace("tower.vision_model", "tower"), in_memory], ids=["C", "B"])
def test_other_spellings_of_keys_export_in_the_hub_s(renamed: Callable[[str], str], tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", CLIP_LLAMA)
    other = hf_folders.rename(shutil.copytree(folder, tmp_path / "other"), renamed)
    assert run("to_hf", other, "--out", tmp_path / "direct") == 0
    assert (
        run("from_hf", other, "--out", tmp_path / "ckpt") == 0
        and run("to_hf", tmp_path / "ckpt", "--out", tmp_path / "out") == 0
    )
    for out in ("direct", "out"):
        assert not list(hf_folders.differing(hf_folders.read(tmp_path / out), hf_folders.read(folder)))


def test_a_state_dict_has_the_same_tensors_in_the_precision_asked_for(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("qwen2"), dtype=BF16)
    assert run("to_torch", folder, "--out", tmp_path / "a.safetensors", "--dtype", "float32") == 0
    wide = {key: value.astype(np.float32) for key, value in hf_folders.read(folder).items()}
    assert not list(hf_folders.differing(load_file(tmp_path / "a.safetensors"), wide))


def test_files_written_tensor_by_tensor_are_those_of_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = dict(b=np.float32, a=BF16, z=np.float16, c=np.float64, y=BF16, é=np.float32, s=np.float32)
    arrays = {
        key: np.asarray(rng.normal(size=(3, i) if i else ()).astype(k)) for i, (key, k) in enumerate(kinds.items())
    }
    save_file(arrays, tmp_path / "theirs", {"format": "pt"})
    tensors.write(tmp_path / "ours", {k: tensors.Tensor(a.shape, a.dtype, lambda a=a: a) for k, a in arrays.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_range_of_an_array_is_read_as_that_range() -> None:
    array = np.arange(4 * 6 * 2).reshape(4, 6, 2)
    for written in ("d h k -> (h k) d", "h k d -> d (h k)", "a b c -> c b a"):
        pattern = parse(written)
        tensor = pattern.to_torch(array)
        for index in ((slice(1, 3), slice(2, 5), slice(0, 2)), (slice(0, 4), slice(0, 3), slice(1, 2))):
            theirs, shape, kept = pattern.box(index, array.shape)
            np.testing.assert_array_equal(pattern.from_torch(tensor[theirs], shape)[kept], array[index])


def test_a_pair_of_towers_is_a_vision_tower_and_comes_back_whole(tmp_path: Path) -> None:
    tower = vision("clip")
    folder = hf_folders.write(tmp_path / "pair", tower)
    config = dict(model_type="clip", vision_config=tower, text_config={}, architectures=["CLIPModel"])
    (folder / "config.json").write_text(json.dumps(config | dict(torch_dtype="float32", dtype="float32")))
    other = {"text_model.final_layer_norm.bias": (7,), "logit_scale": (), "visual_projection.weight": (5, 16)}
    tensors = hf_folders.read(folder) | {key: np.full(shape, 0.5, np.float32) for key, shape in other.items()}
    save_file(tensors, folder / "model.safetensors")
    assert run("from_hf", folder, "--out", tmp_path / "ckpt") == 0
    assert run("to_hf", tmp_path / "ckpt", "--out", tmp_path / "out") == 0
    assert not list(hf_folders.differing(hf_folders.read(tmp_path / "out"), hf_folders.read(folder)))


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("whisper")])
def test_a_config_made_from_models_reads_back_as_them(family: str) -> None:
    parts = read_config.read(FAMILIES[family][0], "config.json")
    if parts.vision is not None and parts.llm is None and parts.vision.variant == "clip":
        assert parts.vision.rows == 5
    assert read_config.read(write_config.write(parts, dtype="float32", item_token=47), "made") == parts


def test_rotary_settings_of_either_version_mean_the_same_and_are_written_for_both() -> None:
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    llama3["original_max_position_embeddings"] = 16
    old = text("llama", rope_theta=5e5, rope_scaling=llama3)
    new = {k: v for k, v in old.items() if not k.startswith("rope_")} | {
        "rope_parameters": {"rope_theta": 5e5, **llama3}
    }
    parts = read_config.read(new, "new")
    assert parts == read_config.read(old, "old") and parts.llm is not None and parts.llm.rope_theta == 5e5
    made = write_config.write(parts, dtype="float32", sources={"llm": new})
    assert (made["rope_theta"], made["rope_scaling"]) == (5e5, llama3) and "rope_parameters" not in made


def test_fields_left_out_have_their_family_s_value() -> None:
    sizes = dict(hidden_size=64, num_attention_heads=32, num_hidden_layers=1)
    mistral = read_config.read(dict(model_type="mistral", **sizes), "").llm
    qwen3 = read_config.read(dict(model_type="qwen3", **sizes), "").llm
    assert mistral is not None and (mistral.sliding_window, mistral.num_kv_heads) == (4096, 8)
    assert qwen3 is not None and (qwen3.head_dim, qwen3.sliding_window, qwen3.vocab_size) == (128, None, 151936)
    own = read_config.read(dict(model_type="qwen2", num_key_value_heads=None, **sizes), "").llm
    assert own is not None and own.num_kv_heads == 32  # null is as many as heads
    window = read_config.read(dict(model_type="mistral", use_sliding_window=False, **sizes), "").llm
    assert window is not None and window.sliding_window == 4096  # a field of Qwen's alone
    llava_15 = read_config.read({"model_type": "llava"}, "").vision
    assert llava_15 == ViT(336, 14, 1024, 24, 16, 4096, 4096, "clip", None, -2, "default")


def test_the_number_of_experts_is_read_in_either_spelling_and_written_in_the_one_that_both_versions_read() -> None:
    old = text("qwen3_moe", mlp_only_layers=[0])
    new = {k: v for k, v in old.items() if k != "num_experts"} | {"num_local_experts": old["num_experts"]}
    parts = read_config.read(new, "new")
    assert parts == read_config.read(old, "old")
    assert parts.llm is not None and parts.llm.experts == Experts(6, 3, 12, renormalise=False, dense_layers=(0,))
    for source in ({}, {"llm": new}):
        assert write_config.write(parts, dtype="float32", sources=source)["num_experts"] == old["num_experts"]
    mixtral = read_config.read(dict(model_type="mixtral"), "").llm
    assert mixtral is not None and mixtral.experts == Experts(8, 2, 14336) and mixtral.sliding_window is None


def test_a_qwen3_moe_whose_layers_are_all_dense_is_a_qwen3() -> None:
    dense = read_config.read(text("qwen3_moe", mlp_only_layers=[0, 1]), "").llm
    assert dense == read_config.read(text("qwen3"), "").llm


@pytest.mark.parametrize(
    ("experts", "changes", "setting"),
    [
        (Experts(4, 2, 8, renormalise=False), {}, "Experts.renormalise=False"),
        (Experts(4, 2, 8, dense_layers=(0,)), {}, "Experts.dense_layers=(0,)"),
        (Experts(4, 2, 8), {"attention_bias": True}, "Decoder.attention_bias=True"),
    ],
)
def test_experts_that_no_family_has_are_not_exported(experts: Experts, changes: dict, setting: str) -> None:
    model = Decoder(48, 32, 2, 4, 2, 40, experts=experts, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{setting} beside experts, without Decoder.qk_norm")):
        write_config.write(Parts(model), dtype="float32")


def test_a_tower_trained_here_is_exported_to_the_layer_that_is_read(tmp_path: Path) -> None:
    vit = ViT(8, 4, 16, 3, 2, 24, 32, "siglip", feature_layer=-2)
    config = write_config.write(Parts(Decoder(48, 32, 2, 4, 2, 40), vit), dtype="float32", item_token=47)
    assert config["vision_config"]["vision_use_head"] is False and config["text_config"]["model_type"] == "llama"


# -- into a run ------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "colocated": dict(llm=Layout(tp=2, pp=2, dp=2), vision=Layout(tp=2, dp=4)),
    "disjoint": dict(llm=Layout(tp=2, pp=2, devices="0-3"), vision=Layout(tp=2, pp=2, devices="4-7")),
}


def trainer(source: Any, layouts: dict[str, Layout]) -> Trainer:
    tower = Module("vision", source.models["vision"].module(np.float32), layouts["vision"])
    llm = Module("llm", source.models["llm"].module(np.float32, encoders=("vision",)), layouts["llm"])
    graph: Graph = vlm((tower,), llm)
    rows, whole = source.models["vision"].rows, (8, 16)
    batch = {k: jax.ShapeDtypeStruct(whole, np.int32) for k in ("tokens", "positions", "segment_ids", "targets")}
    batch["vision.index"], batch["weights"] = batch["tokens"], jax.ShapeDtypeStruct(whole, np.float32)
    batch["vision.pixels"] = jax.ShapeDtypeStruct((8, 8, 8, 3), np.float32)
    assert rows == 4
    config = OptimizerConfig(name="sgd", clip_norm=None)
    sizes = dict(devices=jax.devices(), batch=batch, groups=8, num_microbatches=1)
    return Trainer(TrainSpec(graph=graph, **sizes, optimizer=config))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied model as a folder and as a checkpoint."""
    directory = tmp_path_factory.mktemp("sources")
    folder = hf_folders.write(directory / "hf", llava(text("qwen2", **TIED), vision("siglip")), dtype=BF16, shards=2)
    assert run("from_hf", folder, "--out", directory / "ckpt") == 0
    return {"folder": folder, "checkpoint": directory / "ckpt"}


def check_import(folder: Path, start: Path, layouts: dict[str, Layout]) -> None:
    """The parameters that a trainer under `layouts` starts from are those of the folder, on every device."""
    source = open_source(folder)
    built = trainer(source, layouts)
    starts = initial.open_starts(built.graph, dict.fromkeys(("llm", "vision"), str(start)))
    state = initial.state(built, starts)
    seen = set()
    for key, stage in built.pipeline.stages.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params[key]):
            names = initial._names(stage.parameters, path)
            arrays = source.fetch([f"{key[0]}/{name}" for name in names]).values()
            index = (slice(None),) * (leaf.ndim - (path[0].key == "layers"))
            rows = [np.asarray(a[index], np.float32) for a in arrays]
            np.testing.assert_array_equal(
                leaf, np.stack(rows) if path[0].key == "layers" else rows[0], err_msg=str(path)
            )
            for shard in leaf.addressable_shards:  # also each replica
                np.testing.assert_array_equal(shard.data, np.asarray(leaf)[shard.index])
            seen |= {f"{key[0]}/{name}" for name in names}
    assert seen == set(source.arrays)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
@pytest.mark.parametrize("layouts", list(LAYOUTS))
def test_import_under_layouts_is_the_unsharded_import_bit_for_bit(
    sources: dict[str, Path], layouts: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 300)  # bytes: a tensor comes in several, the last two of which overlap
    check_import(sources["folder"], sources[kind], LAYOUTS[layouts])


@pytest.mark.slow
def test_import_under_tp_2_pp_2_dp_2_for_each_of_two_disjoint_modules_is_the_unsharded_import(
    sources: dict[str, Path],
) -> None:
    code = """
import sys
from pathlib import Path
import jax
from test_convert import Layout, check_import
jax.config.update("jax_num_cpu_devices", 16)  # in place of those of the tests
layouts = {name: Layout(tp=2, pp=2, dp=2, devices=d) for name, d in (("llm", "0-7"), ("vision", "8-15"))}
for start in sys.argv[1:]:
    check_import(Path(sys.argv[1]), Path(start), layouts)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code, *map(str, sources.values())], check=True, env=environment)


def test_a_tower_alone_gets_a_fresh_projector(tmp_path: Path, sources: dict[str, Path]) -> None:
    tower = hf_folders.write(tmp_path / "tower", vision("siglip"))
    built = trainer(open_source(sources["folder"]), LAYOUTS["disjoint"])
    fresh = built.init()
    state = initial.state(built, initial.open_starts(built.graph, {"vision": str(tower)}))
    last, first = ("vision", 1), ("vision", 0)
    for name, value in fresh.params[last]["last"]["projector"].items():
        np.testing.assert_array_equal(state.params[last]["last"]["projector"][name], value)
    stored = hf_folders.read(tower)["vision_model.embeddings.position_embedding.weight"]
    np.testing.assert_array_equal(state.params[first]["first"]["position"], stored)
    np.testing.assert_array_equal(state.params["llm", 0]["first"]["embed"], fresh.params["llm", 0]["first"]["embed"])


def test_another_model_than_the_run_s_is_refused_by_setting(tmp_path: Path, sources: dict[str, Path]) -> None:
    built = trainer(open_source(sources["folder"]), LAYOUTS["disjoint"])
    other = hf_folders.write(tmp_path / "other", text("qwen2", rope_theta=1e6, **TIED))
    refused = {
        "speech": (other, "init_from names 'speech'; the modules are vision, llm"),
        "vision": (other, "holds 0 models of kind ViT"),
        "llm": (
            other,
            "llm: Decoder.rope_theta=10000.0, but .*other.* was made with 1000000.0; set Decoder.rope_theta",
        ),
    }
    for module, (path, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            initial.open_starts(built.graph, {module: str(path)})


@pytest.mark.slow
def test_a_run_that_learns_nothing_gives_its_folder_back(tmp_path: Path) -> None:
    gin = runs.write(tmp_path)
    folder = hf_folders.write(tmp_path / "hf", llava(text("llama", vocab_size=64), vision("siglip")))
    models = {f"decoder.Decoder.{f}": v for f, v in vars(open_source(folder).models["llm"]).items() if v is not None}
    models |= {f"vit.ViT.{f}": v for f, v in vars(open_source(folder).models["vision"]).items() if v is not None}
    start = runs.settings(steps=1, init_from=dict.fromkeys(("llm", "vision"), str(folder)))
    still = {"optimizer.OptimizerConfig.learning_rate": 1e-30, "optimizer.OptimizerConfig.weight_decay": 0.0}
    assert train.main(runs.arguments(gin, tmp_path / "run", models | dict(start) | still)) == 0
    assert run("to_hf", tmp_path / "run", "--out", tmp_path / "out") == 0
    assert not list(hf_folders.differing(hf_folders.read(tmp_path / "out"), hf_folders.read(folder)))
