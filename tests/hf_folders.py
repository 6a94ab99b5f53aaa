"""Tiny Hugging Face folders with random values, written without transformers: keys and shapes as the hub has them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Shapes = dict[str, tuple[int, ...]]
VOCAB, IMAGE_TOKEN, AUDIO_TOKEN = 48, 47, 46
TEXT_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TEXT_CLASSES |= {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe", "dots1": "Dots1"}
VISION_CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def text(kind: str, **changes: Any) -> dict[str, Any]:
    """The config of a decoder alone."""
    sizes: dict[str, Any] = dict(
        architectures=[f"{TEXT_CLASSES[kind]}ForCausalLM"],
        model_type=kind,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_act="silu",
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    if kind in ("mistral", "mixtral"):
        sizes["sliding_window"] = None
    if kind == "mixtral":
        sizes |= dict(num_local_experts=5, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        sizes |= dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=False)
    if kind == "qwen2_moe":
        sizes |= dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12)
        sizes |= dict(shared_expert_intermediate_size=20, norm_topk_prob=False)
    if kind == "dots1":
        sizes |= dict(n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=12)
        sizes |= dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, sliding_window=None)
        sizes |= dict(first_k_dense_replace=1)
    return sizes | changes


def vision(kind: str, **changes: Any) -> dict[str, Any]:
    """The config of a vision tower alone: 8 x 8 pictures in four patches."""
    sizes = dict(
        architectures=[VISION_CLASSES[kind]],
        model_type=f"{kind}_vision_model",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return sizes | changes


def whisper(**changes: Any) -> dict[str, Any]:
    """The config of a Whisper: 16 frames of 5 bins."""
    sizes = dict(
        architectures=["WhisperForConditionalGeneration"],
        model_type="whisper",
        vocab_size=VOCAB,
        num_mel_bins=5,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=20,
        max_source_positions=8,
        max_target_positions=6,
        activation_function="gelu",
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return sizes | changes


def hearing(**changes: Any) -> dict[str, Any]:
    """The config of Qwen2-Audio's encoder alone."""
    theirs = ("num_mel_bins", "d_model", "max_source_positions")
    sizes = {k: v for k, v in whisper().items() if k.startswith("encoder_") or k in theirs}
    return sizes | dict(architectures=["Qwen2AudioEncoder"], model_type="qwen2_audio_encoder") | changes


def qwen2_audio(language: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The config of an audio-language model with this decoder."""
    sizes = dict(
        architectures=["Qwen2AudioForConditionalGeneration"],
        model_type="qwen2_audio",
        audio_token_index=AUDIO_TOKEN,
        tie_word_embeddings=language["tie_word_embeddings"],
        text_config=language,
        audio_config=hearing(),
    )
    return sizes | changes


def llava(language: dict[str, Any], tower: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The config of a vision-language model of the two."""
    sizes = dict(
        architectures=["LlavaForConditionalGeneration"],
        model_type="llava",
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower["model_type"].startswith("clip") else "full",
        tie_word_embeddings=language["tie_word_embeddings"],
        text_config=language,
        vision_config=tower,
    )
    return sizes | changes


def text_shapes(config: Mapping[str, Any], prefix: str = "") -> Shapes:
    """Key -> shape of a decoder's tensors."""
    d, n = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * n, config["num_key_value_heads"] * n
    found: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], d)
    layer: Shapes = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    layer |= {"self_attn.q_proj.weight": (q, d), "self_attn.o_proj.weight": (d, q)}
    layer |= {f"self_attn.{x}_proj.weight": (kv, d) for x in "kv"}
    if config["model_type"] in ("qwen2", "qwen2_moe"):
        layer |= {f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
    if config["model_type"] in ("qwen3", "qwen3_moe", "dots1"):
        layer |= {f"self_attn.{x}_norm.weight": (n,) for x in "qk"}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{key}": shape for key, shape in (layer | _behind_attention(config, i)).items()}
    return {prefix + key: shape for key, shape in found.items()}


def _behind_attention(config: Mapping[str, Any], layer: int) -> Shapes:
    d, f = config["hidden_size"], config["intermediate_size"]
    three = lambda stem, f, gate, up, down: {
        f"{stem}.{gate}.weight": (f, d),
        f"{stem}.{up}.weight": (f, d),
        f"{stem}.{down}.weight": (d, f),
    }
    if config["model_type"] == "mixtral":
        found: Shapes = {"block_sparse_moe.gate.weight": (config["num_local_experts"], d)}
        for e in range(config["num_local_experts"]):
            found |= three(f"block_sparse_moe.experts.{e}", f, "w1", "w3", "w2")
        return found
    dense = layer in config.get("mlp_only_layers", ()) or (layer + 1) % config.get("decoder_sparse_step", 1)
    names, kind = ("gate_proj", "up_proj", "down_proj"), config["model_type"]
    if kind not in ("qwen2_moe", "qwen3_moe", "dots1") or dense or layer < config.get("first_k_dense_replace", 0):
        return three("mlp", f, *names)
    count, width = config.get("num_experts") or config["n_routed_experts"], config["moe_intermediate_size"]
    found = {"mlp.gate.weight": (count, d)}
    if kind == "qwen2_moe":
        found |= three("mlp.shared_expert", config["shared_expert_intermediate_size"], *names)
        found |= {"mlp.shared_expert_gate.weight": (1, d)}
    if kind == "dots1":
        found |= three("mlp.shared_experts", config["n_shared_experts"] * width, *names)
        found |= {"mlp.gate.e_score_correction_bias": (count,)}
    for e in range(count):
        found |= three(f"mlp.experts.{e}", width, *names)
    return found


def vision_shapes(config: Mapping[str, Any], prefix: str = "vision_model.") -> Shapes:
    """Key -> shape of a tower's tensors, those that no vision-language model reads among them."""
    d, f, p = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    clip = config["model_type"] == "clip_vision_model"
    patches = (config["image_size"] // p) ** 2
    norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    linear = lambda name, o, i: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    found: Shapes = {"embeddings.patch_embedding.weight": (d, 3, p, p), **norm("post_layernorm")}
    found["embeddings.position_embedding.weight"] = (patches + clip, d)
    if clip:
        found |= {"embeddings.class_embedding": (d,), **norm("pre_layrnorm")}
    else:
        found |= {"embeddings.patch_embedding.bias": (d,), "head.probe": (1, 1, d), **norm("head.layernorm")}
        found |= {"head.attention.in_proj_weight": (3 * d, d), "head.attention.in_proj_bias": (3 * d,)}
        found |= linear("head.attention.out_proj", d, d)
        found |= linear("head.mlp.fc1", f, d) | linear("head.mlp.fc2", d, f)
    for i in range(config["num_hidden_layers"]):
        layer = norm("layer_norm1") | norm("layer_norm2") | linear("mlp.fc1", f, d) | linear("mlp.fc2", d, f)
        for x in ("q", "k", "v", "out"):
            layer |= linear(f"self_attn.{x}_proj", d, d)
        found |= {f"encoder.layers.{i}.{key}": shape for key, shape in layer.items()}
    return {prefix + key: shape for key, shape in found.items()}


def hearing_shapes(config: Mapping[str, Any], prefix: str = "", side: str = "encoder") -> Shapes:
    """Key -> shape of an audio encoder's tensors, or of Whisper's decoder's."""
    d, m, f = config["d_model"], config.get("num_mel_bins"), config[f"{side}_ffn_dim"]
    positions = config["max_source_positions" if side == "encoder" else "max_target_positions"]
    norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    linear = lambda name, o, i: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}

    def attention(name: str) -> Shapes:
        found: Shapes = {f"{name}.k_proj.weight": (d, d), **norm(f"{name}_layer_norm")}
        for x in ("q", "v", "out"):
            found |= linear(f"{name}.{x}_proj", d, d)
        return found

    found: Shapes = {"embed_positions.weight": (positions, d), **norm("layer_norm")}
    if side == "encoder":
        found |= {"conv1.weight": (d, m, 3), "conv1.bias": (d,), "conv2.weight": (d, d, 3), "conv2.bias": (d,)}
    else:
        found["embed_tokens.weight"] = (config["vocab_size"], d)
    for i in range(config[f"{side}_layers"]):
        layer = attention("self_attn") | norm("final_layer_norm") | linear("fc1", f, d) | linear("fc2", d, f)
        layer |= attention("encoder_attn") if side == "decoder" else {}
        found |= {f"layers.{i}.{key}": shape for key, shape in layer.items()}
    return {prefix + key: shape for key, shape in found.items()}


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Key -> shape of all that a folder of this config holds."""
    if config["model_type"] == "whisper":
        model = "" if config["architectures"] == ["WhisperModel"] else "model."
        return hearing_shapes(config, f"{model}encoder.") | hearing_shapes(config, f"{model}decoder.", "decoder")
    if config["model_type"] == "qwen2_audio_encoder":
        return hearing_shapes(config)
    if config["model_type"] == "qwen2_audio":
        language, encoder = config["text_config"], config["audio_config"]
        d = language["hidden_size"]
        found = text_shapes(language, "language_model.") | hearing_shapes(encoder, "audio_tower.")
        projector: Shapes = {"linear.weight": (d, encoder["d_model"]), "linear.bias": (d,)}
        return found | {f"multi_modal_projector.{key}": shape for key, shape in projector.items()}
    if config["model_type"] != "llava":
        return text_shapes(config) if "vocab_size" in config else vision_shapes(config)
    language, tower = config["text_config"], config["vision_config"]
    d, v = language["hidden_size"], tower["hidden_size"]
    found = text_shapes(language, "language_model.") | vision_shapes(tower, "vision_tower.vision_model.")
    layers = config["vision_feature_layer"]
    projector: Shapes = {"linear_1.weight": (d, v * (len(layers) if isinstance(layers, list) else 1))}
    projector["linear_2.weight"] = (d, d)
    if config["multimodal_projector_bias"]:
        projector |= {"linear_1.bias": (d,), "linear_2.bias": (d,)}
    return found | {f"multi_modal_projector.{k}": s for k, s in projector.items()}


def write(directory: Path, config: Mapping[str, Any], *, dtype: Any = np.float32, shards: int = 1) -> Path:
    """The folder, with a tokenizer beside it; several `shards` have an index."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in shapes(config).items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        tensors[key] = (centre + scale * rng.normal(size=shape)).astype(dtype)
    if config["model_type"] == "qwen2_audio" and config["tie_word_embeddings"]:  # its class ties nothing
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    keys = sorted(tensors)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::shards]}, directory / name, {"format": "pt"})
    if shards > 1:
        weight_map = {key: names[i % shards] for i, key in enumerate(keys)}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    kind = "bfloat16" if dtype is ml_dtypes.bfloat16 else np.dtype(dtype).name
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": kind, "dtype": kind}))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    return directory


def read(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def rename(directory: Path, renamed: Any) -> Path:
    """The folder, in one file, with the keys that the function `renamed` makes of its own."""
    tensors = {renamed(key): value for key, value in read(directory).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def differing(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Keys of tensors that are not the same bytes on both sides."""
    for key in sorted(a.keys() | b.keys()):
        same = key in a and key in b and a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
        if not same or a[key].tobytes() != b[key].tobytes():
            yield key
