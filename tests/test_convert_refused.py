"""What cannot be converted is refused by field, key or file, with the way out; and nothing is written."""

import copy
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_folders
import ml_dtypes
import numpy as np
import pytest
from hf_folders import hearing, llava, qwen2_audio, text, vision, whisper
from safetensors.numpy import save_file

from hetjax import convert
from hetjax.hf import audio, read_config
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.parts import Parts
from hetjax.hf.stored import open_source
from models.decoder import Decoder
from models.whisper import Whisper

CLIP_LLAMA = llava(text("llama"), vision("clip"))
TIED = dict(tie_word_embeddings=True)


def run(*arguments: object) -> int:
    return convert.main([str(a) for a in arguments])


REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type='gpt2': this architecture is not supported; supported are"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config='fp8': quantised weights are not read"),
    (
        {"model_type": "siglip2"},
        "model_type='siglip2': SigLIP 2 with pictures of any shape (NaFlex) is not supported; take",
    ),
    ({"hidden_act": "gelu"}, "hidden_act='gelu': decoders are computed with 'silu' only"),
    ({"attention_bias": True}, "attention_bias=True: only False is computed"),
    ({"is_causal": False}, "is_causal=False: only True is computed"),
    (
        {"per_layer_config": {"0": {"rms_norm_eps": 1}}},
        "per_layer_config={'0': {'rms_norm_eps': 1}}: layers that differ",
    ),
    ({"mlp_bias": True}, "mlp_bias=True: only False is computed"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1.0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn': only 'default'"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: there are at most 10000 layers"),
    (dict(model_type="qwen3_moe", num_hidden_layers=10**9), "num_hidden_layers=1000000000: there are at most 10000"),
    ({"num_attention_heads": 5}, "num_heads=5 is not a multiple of num_kv_heads=2"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1), "layer_types=['full_"),
    (dict(model_type="mixtral", num_experts_per_tok=9), "Experts.per_token=9 is more than count=8"),
    (
        dict(model_type="qwen3_moe", num_experts=4, num_local_experts=8),
        "num_local_experts=8 and num_experts=4 contradict each other",
    ),
    (dict(model_type="qwen3_moe", shared_expert_intermediate_size=8), "shared_expert_intermediate_size=8: only 0"),
    (dict(model_type="qwen3_moe", decoder_sparse_step=0), "decoder_sparse_step=0: it must be at least 1"),
]
REFUSED_VLM: list[tuple[dict[str, Any], str]] = [
    ({"vision_feature_layer": [-2, -5]}, "feature_layer=[-2, -5]; it must be a number from -4 to 3"),
    ({"vision_feature_layer": "last"}, "feature_layer='last'; it must be a number from -4 to 3"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu': only the exact 'gelu'"),
    ({"text_config": {"model_type": "olmoe"}}, "text_config.model_type='olmoe': not supported"),
    (
        {"vision_config": {"model_type": "siglip2_vision_model"}},
        "vision_config.model_type='siglip2_vision_model': SigLIP 2",
    ),
    ({"vision_feature_select_strategy": "patch"}, "select='patch'; it must be one of full, default"),
    ({"vision_config": vision("clip", hidden_act="gelu")}, "vision_config: hidden_act='gelu': only 'quick_gelu'"),
    ({"vision_config": vision("clip", num_hidden_layers=10**9)}, "ViT.num_layers=1000000000; a model has at most"),
    (
        {"vision_config": vision("clip", per_layer_config={"0": {}})},
        "vision_config: per_layer_config={'0': {}}: layers",
    ),
    ({"text_config": text("llama", is_causal=False)}, "text_config: is_causal=False: only True is computed"),
    ({"vision_config": vision("clip", image_size=[8, 4])}, "image_size=[8, 4]: pictures and patches must be square"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_CONFIGS + REFUSED_VLM)
def test_a_config_that_means_something_else_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    config = (CLIP_LLAMA if (changes, message) in REFUSED_VLM else text("llama")) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config.read(config, "config.json")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = hf_folders.read(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(mapping: dict[str, str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))

    return apply


def disguised(folder: Path) -> None:
    """A pickle that would write a file if it were loaded, with another name."""
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(str(folder.parent / "new" / "loaded"))))


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def two_shards(folder: Path) -> None:
    """The index is right about every key, but the second shard has one of the first's too."""
    tensors = hf_folders.read(folder)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({NORM: tensors[NORM]}, folder / "b.safetensors")
    mapping = dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def quantised(folder: Path) -> None:
    """As bitsandbytes stores it: other shapes, and keys of scales."""
    tensors = hf_folders.read(folder)
    tensors |= {HEAD: np.zeros((7, 1), np.uint8), f"{HEAD}.absmax": np.zeros(3, np.float32)}
    save_file(tensors, folder / "model.safetensors")


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_short, r"model.safetensors cannot be read .*cut short; download it again"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"xy"), r"model.safetensors cannot be read"),
    "missing key": (weights(lambda t: t.pop(NORM)), rf"{NORM} is missing \(1 of"),
    "missing head": (weights(lambda t: t.pop(HEAD)), r"lm_head.weight is missing .*set tie_word_embeddings=true"),
    "surplus key": (weights(lambda t: t.update(extra=t[NORM])), r"extra has no place in the model"),
    "wrong shape": (
        weights(lambda t: t.update({NORM: t[NORM][:5]})),
        rf"{NORM} has shape \[5\], config.json makes it \[32\]",
    ),
    "fp8": (
        weights(lambda t: t.update({HEAD: t[HEAD].astype(ml_dtypes.float8_e4m3fn)})),
        r"lm_head.weight is stored as F8",
    ),
    "int8": (
        weights(lambda t: t.update({HEAD: t[HEAD].astype(np.int8)})),
        r"lm_head.weight is stored as I8.*quantised",
    ),
    "quantised": (quantised, r"lm_head.weight is stored as U8; 8-bit and quantised weights are not read"),
    "pickle, disguised": (disguised, r"model.safetensors is a pickle.*never read here"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"cannot be read .*cut short; download it"),
    "empty header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}"),
        r"is missing \(\d+ of",
    ),
    "one key in two shards": (two_shards, rf"{NORM} is in a.safetensors and in b.safetensors; the shards are of two"),
    "index of numbers": (indexed({NORM: 1}), "has no weight_map of keys and file names"),  # type: ignore[dict-item]
    "index of a list": (lambda f: indexed({})(f), "has no weight_map of keys and file names"),
    "index cut": (
        lambda f: [indexed({})(f), (f / "model.safetensors.index.json").write_text('{"weight_map": {')],
        r"model.safetensors.index.json is not JSON",
    ),
    "index with an absolute path": (indexed({NORM: "/etc/hostname"}), r"names /etc/hostname, which is not there"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config.json holds a list, not a JSON object"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), r"config.json is not JSON"),
    "config empty": (lambda f: (f / "config.json").write_text(""), r"config.json is not JSON"),
    "one array twice": (
        weights(lambda t: t.update({"lm_head.weight_": t[HEAD]})),
        r"lm_head.weight_ has no place in the model",
    ),
    "pickle": (pickled, r"pytorch_model.bin is a pickle.*never read here.*safe_serialization"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"neither model.safetensors nor"),
    "no shard": (
        indexed({NORM: "model-00002-of-00002.safetensors"}),
        r"names model-00002-of-00002.safetensors, which is not",
    ),
    "other index": (
        indexed({NORM: "model-00001-of-00002.safetensors"}),
        r"is in model-00001-of-00002.safetensors alone",
    ),
    "index outside": (indexed({NORM: "../folder/config.json"}), r"names ../folder/config.json, which is not there"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), r"config.json is not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), r"neither a Hugging Face folder \(config.json\)"),
    "two heads": (
        lambda f: (f / "config.json").write_text(json.dumps(text("llama", **TIED))),
        r"differs from the embedding",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_broken_folders_are_refused_and_nothing_is_written(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("llama"))
    damage, message = BROKEN[name]
    damage(folder)
    (tmp_path / "new").mkdir()
    assert run(command, folder, "--out", tmp_path / "new" / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    assert not list((tmp_path / "new").iterdir())


def test_one_array_under_two_spellings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = hf_folders.write(tmp_path / "folder", CLIP_LLAMA)
    key = "vision_tower.vision_model.embeddings.class_embedding"
    weights(lambda t: t.update({key.replace("vision_model.", ""): t[key] + 1}))(folder)
    assert run("from_hf", folder, "--out", tmp_path / "out") == 2
    assert "are the same array; remove one of them" in capsys.readouterr().err


VALUES = [None, "x", -1, 0, 1.5, [], {}, True, [1], {"a": 1}, float("nan"), "1", [[]]]


def nodes(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from nodes(value, (*path, key))


def test_whatever_a_config_holds_it_is_read_or_refused_by_its_path() -> None:
    scaled = text("llama", rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0))
    refused = 0
    for config in (scaled, text("qwen3"), CLIP_LLAMA, vision("siglip")):
        for *parents, last in nodes(config):
            for value in VALUES:
                broken = copy.deepcopy(config)
                node = broken
                for parent in parents:
                    node = node[parent]
                node[last] = value
                try:
                    read_config.read(broken, "a/config.json")
                except ConvertError as error:
                    refused += 1
                    assert str(error).startswith("a/config.json: ")
    assert refused > 500


def test_a_damaged_header_is_refused_whatever_the_damage(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("llama"))
    path = folder / "model.safetensors"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            open_source(folder)
        except ConvertError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > 90


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_conversion_that_is_killed_leaves_nothing_and_may_run_again(command: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("llama", num_hidden_layers=200))
    new = tmp_path / "new"
    process = subprocess.Popen(
        [sys.executable, "-m", "hetjax.convert", command, str(folder), "--out", str(new / "out")]
    )
    while not new.exists():  # it writes
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (new / "out").exists()
    assert run(command, folder, "--out", new / "out") == 0


def test_what_is_there_is_never_overwritten_and_a_failed_write_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf_folders.write(tmp_path / "folder", text("llama"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    for command, out in (("to_hf", "there"), ("from_hf", "there"), ("to_torch", "there.safetensors")):
        assert run(command, folder, "--out", tmp_path / out) == 2
        assert "is there already; name another" in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine" and not list((tmp_path / "there").iterdir())
    monkeypatch.setattr("hetjax.hf.export.write_json", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    assert run("to_hf", folder, "--out", tmp_path / "out") == 2
    assert "no space left; is the disk full?" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "there", "there.safetensors"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (whisper(activation_function="relu"), "activation_function='relu': only 'gelu' is computed"),
        (whisper(num_attention_heads=4), "num_attention_heads=4: encoder_attention_heads=2 contradicts it; remove"),
        (hearing(intermediate_size=8), "intermediate_size=8: encoder_ffn_dim=24 contradicts it; remove"),
        (whisper(scale_embedding=True), "scale_embedding=True: only False is computed"),
        (whisper(encoder_attention_heads=3), "Whisper.width=16 must be even and a multiple of num_heads=3"),
        (qwen2_audio(text("llama"), audio_config=whisper()), "audio_config.model_type='whisper': not supported"),
        (qwen2_audio(text("llama") | {"model_type": "gpt2"}), "text_config.model_type='gpt2': not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_audio_models_that_are_not_computed_are_refused_by_field(config: dict, message: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)):
        read_config.read(config, "config.json")


def test_features_that_are_not_computed_are_refused_by_field() -> None:
    model = Whisper(5, 16, 2, 2, 24, 16, num_positions=8)
    made = audio.features(audio.reader({}, model, "x"), model)
    assert audio.reader(made, model, "x") == audio.reader({}, model, "x")
    for field, value in (("sampling_rate", 8000), ("feature_size", 80), ("do_normalize", True)):
        with pytest.raises(ConvertError, match=rf"x: {field}={value}: only .* is computed"):
            audio.reader(made | {field: value}, model, "x")


@pytest.mark.parametrize(("setting", "value"), [("variant", "whisper"), ("projector", "mlp")])
def test_an_audio_encoder_that_no_class_holds_beside_a_decoder_is_not_exported(setting: str, value: str) -> None:
    sizes = dict(num_mels=5, width=16, num_layers=2, num_heads=2, mlp_width=24, output_width=32, variant="qwen2_audio")
    with pytest.raises(ConvertError, match=f"Whisper.{setting}='{value}': the one class that holds an audio encoder"):
        registry.WHOLE_OF_KIND["qwen2_audio"].check(
            Parts(Decoder(48, 32, 2, 4, 2, 40), audio=Whisper(**(sizes | {setting: value})))
        )


def test_values_beyond_the_range_of_the_type_asked_for_are_refused_by_key(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = hf_folders.write(tmp_path / "hf", text("llama"))
    tensors = hf_folders.read(folder)
    tensors["model.norm.weight"][3] = -7e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert run("from_hf", folder, "--out", tmp_path / "ckpt") == 0
    assert run("to_hf", tmp_path / "ckpt", "--out", tmp_path / "out", "--dtype", "float16") == 2
    assert "--dtype=float16: model.norm.weight holds 7e+04, beyond" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("to_hf", tmp_path / "ckpt", "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
