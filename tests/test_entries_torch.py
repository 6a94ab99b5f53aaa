"""Layers that attend to an encoder, and features added behind the first layers, are those of transformers: outputs and
gradients of tiny random models in float32.

Skipped where torch and transformers are not installed: pip install torch==2.13.0, then -e '.[torch]'.
"""

import dataclasses
from typing import Any

import beside_torch
import jax
import jax.numpy as jnp
import numpy as np
from beside_torch import torch, transformers

from hetjax.hf.families.decoder import KEYS
from hetjax.hf.pattern import parse
from hetjax.judge.reference import _initial, apply_module, layer_params
from models.cross_attention import CrossAttention
from models.decoder import Decoder

pytestmark = beside_torch.QUIET
B, S, ITEMS, ROWS = 2, 12, 3, 4
SIZES = dict(vocab_size=32, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24)
CROSS = {
    "layers/cross/attention_norm": "layers.N.input_layernorm.weight",
    "layers/cross/attention/q": "layers.N.cross_attn.q_proj.weight",
    "layers/cross/attention/k": "layers.N.cross_attn.k_proj.weight",
    "layers/cross/attention/v": "layers.N.cross_attn.v_proj.weight",
    "layers/cross/attention/o": "layers.N.cross_attn.o_proj.weight",
    "layers/cross/attention/q_norm": "layers.N.cross_attn.q_norm.weight",
    "layers/cross/attention/k_norm": "layers.N.cross_attn.k_norm.weight",
    "layers/cross/attention_gate": "layers.N.cross_attn_attn_gate",
    "layers/cross/mlp_gate": "layers.N.cross_attn_mlp_gate",
    "layers/cross/mlp_norm": "layers.N.post_attention_layernorm.weight",
    "layers/cross/mlp/gate": "layers.N.mlp.gate_proj.weight",
    "layers/cross/mlp/up": "layers.N.mlp.up_proj.weight",
    "layers/cross/mlp/down": "layers.N.mlp.down_proj.weight",
}
TABLE = {ours: (theirs.removeprefix("model."), pattern) for ours, (theirs, pattern) in KEYS.items()}
TABLE |= {ours: (theirs, TABLE.get(ours.replace("cross/", ""), ("", "d -> d"))[1]) for ours, theirs in CROSS.items()}


def batch(index: np.ndarray, key: str) -> dict[str, Any]:
    """Two rows of one document each."""
    rng = np.random.default_rng(0)
    places = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    tokens = rng.integers(1, SIZES["vocab_size"], (B, S)).astype(np.int32)  # 0 is padding, which transformers skips
    return {"tokens": tokens, "positions": places, "segment_ids": np.ones((B, S), np.int32), key: index}


def ours(config: Decoder, model: Any, inputs: dict[str, np.ndarray], microbatch: Any, **made: Any) -> tuple[Any, Any]:
    """(hidden states behind the last norm, gradients of their weighted mean by transformers' names)."""
    definition = config.module(jnp.float32, encoders=("vision",), **made)
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    abstract = jax.eval_shape(lambda: _initial(definition, jax.random.key(0)))
    places = {}  # by their name: path and layer

    def read(path: Any, leaf: Any, layer: int | None = None) -> np.ndarray:
        names = "/".join(part.key for part in path)
        if names == "last/head":
            return np.zeros(leaf.shape, np.float32)
        theirs, pattern = TABLE[names]
        theirs = theirs.replace("N", str(layer))
        places[theirs] = names, layer, pattern
        return parse(pattern).from_torch(tensors[theirs], leaf.shape)

    ends = {k: jax.tree_util.tree_map_with_path(read, {k: abstract[k]})[k] for k in ("first", "last")}
    one = lambda i: jax.eval_shape(lambda tree: layer_params(definition, tree, i), abstract["layers"])
    layers = [
        jax.tree_util.tree_map_with_path(lambda path, leaf, i=i: read(path, leaf, i), {"layers": one(i)})["layers"]
        for i in range(config.num_layers)
    ]

    def output(ends: Any, layers: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        stacked = {"layers": _stacked(layers)}
        y = apply_module(definition, ends | stacked, inputs, microbatch)["x"]
        return (y * directions(y.shape)).mean(), y

    grads, y = jax.jit(jax.grad(output, argnums=(0, 1, 2), has_aux=True))(ends, layers, inputs)
    found = {name: grads[2][name] for name in inputs}
    for theirs, (names, layer, pattern) in places.items():
        tree = grads[0] if layer is None else {"layers": grads[1][layer]}
        for name in names.split("/"):
            tree = tree[name]
        found[theirs] = parse(pattern).to_torch(np.asarray(tree))
    return y, found


def _stacked(layers: list[Any]) -> Any:
    """One tree of the layers that have a leaf."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    have = {name: [layer[name] for layer in layers if name in layer] for name in names}
    return {n: _stacked(v) if isinstance(v[0], dict) else jnp.stack(v) for n, v in have.items()}


def directions(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_same(got: tuple[Any, Any], y: Any, model: Any, inputs: dict[str, Any]) -> None:
    """Output and all gradients, to 1e-5 of the largest of each."""
    (y * torch.tensor(directions(y.shape))).mean().backward()
    expected = {n: p.grad.numpy() for n, p in model.named_parameters()} | {n: x.grad.numpy() for n, x in inputs.items()}
    np.testing.assert_allclose(got[0], y.detach().numpy(), rtol=0, atol=1e-5 * float(y.detach().abs().max()))
    assert got[1].keys() == expected.keys()
    for name, grad in expected.items():
        assert np.abs(grad).max() > 0, name
        np.testing.assert_allclose(got[1][name], grad, rtol=0, atol=1e-5 * np.abs(grad).max(), err_msg=name)


def randomised(model: Any) -> Any:
    """No parameter is zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(float("norm" in name) + 0.3 * torch.randn_like(p))
    return model.float().eval()


def test_cross_attention_is_that_of_llama_3_2_vision() -> None:
    layers = dict(cross_attention_layers=[1, 2], rope_scaling={"rope_type": "default", "rope_theta": 500.0})
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **sizes, intermediate_size=24, pad_token_id=0, rms_norm_eps=1e-6, attn_implementation="eager", **layers
    )
    model = randomised(transformers.models.mllama.modeling_mllama.MllamaTextModel(config))
    decoder = Decoder(
        **SIZES | dict(vocab_size=40, num_heads=2, num_kv_heads=1), cross_attention=CrossAttention((1, 2))
    )
    theta = config.rope_parameters["rope_theta"] if hasattr(config, "rope_parameters") else 500.0
    decoder = dataclasses.replace(decoder, rope_theta=theta)

    # Items 0 and 1 stand in the first row, at its start and behind; item 2 in the second.
    index = np.full((B, S), -1, np.int32)
    index[0, 0], index[0, 5], index[1, 0] = 0, ROWS, 2 * ROWS
    rows = np.random.default_rng(2).normal(size=(ITEMS, ROWS, 16)).astype(np.float32)
    states = torch.tensor(rows, requires_grad=True)
    seen = torch.zeros(B, 1, S, ITEMS * ROWS)  # transformers has a row's items in each row of the batch
    seen[0, :, :, :ROWS], seen[0, :, 5:, ROWS : 2 * ROWS], seen[1, :, :, 2 * ROWS :] = 1, 1, 1
    microbatch = batch(index, "vision.index")
    y = model(
        input_ids=torch.tensor(microbatch["tokens"]).long(),
        cross_attention_states=states.reshape(1, -1, 16).expand(B, -1, -1),
        cross_attention_mask=torch.where(seen > 0, 0.0, torch.finfo(torch.float32).min),
        full_text_row_masked_out_mask=torch.ones(B, 1, S, 1),
        use_cache=False,
    ).last_hidden_state
    assert_same(ours(decoder, model, {"vision": rows}, microbatch), y, model, {"vision": states})


def test_features_are_added_as_in_qwen3_vl() -> None:
    config = transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLTextConfig(
        **dict(vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
        **dict(intermediate_size=24, head_dim=8, attn_implementation="eager", rms_norm_eps=1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]},
    )
    model = randomised(transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel(config))
    decoder = Decoder(**SIZES, qk_norm=True, rope_theta=500.0)

    index = np.full((B, S), -1, np.int32)
    index[0, 2:6], index[0, 7:11], index[1, 3:7] = np.arange(4), 8 + np.arange(4), 4 + np.arange(4)
    rng = np.random.default_rng(2)
    inputs = {name: rng.normal(size=(ITEMS, ROWS, 16)).astype(np.float32) for name in ("vision", "vision.deep0")}
    inputs |= {"vision.deep1": rng.normal(size=(ITEMS, ROWS, 16)).astype(np.float32)}
    states = {name: torch.tensor(rows, requires_grad=True) for name, rows in inputs.items()}
    at = torch.tensor(index)[torch.tensor(index >= 0)].long()
    placed = {name: x.reshape(-1, 16)[at] for name, x in states.items()}
    microbatch, mask = batch(index, "vision.index"), torch.tensor(index >= 0)
    embedded = model.embed_tokens(torch.tensor(microbatch["tokens"]).long())
    y = model(
        inputs_embeds=embedded.masked_scatter(mask[..., None], placed["vision"]),
        visual_pos_masks=mask,
        deepstack_visual_embeds=[placed["vision.deep0"], placed["vision.deep1"]],
        use_cache=False,
    ).last_hidden_state
    assert_same(ours(decoder, model, inputs, microbatch, deepstack={"vision": 2}), y, model, states)
