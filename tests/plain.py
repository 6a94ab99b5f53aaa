"""The models again in plain NumPy: one row or picture, and one head, at a time; formulas as Hugging Face has them."""

import math
from typing import Any

import numpy as np

from models.attention import RopeScaling
from models.decoder import Decoder
from models.moe import Experts
from models.vit import ViT
from models.whisper import Whisper

Tree = Any


def layer_of(params: Tree, i: int) -> Tree:
    """Layer `i` of stacked layers."""
    return {k: layer_of(v, i) if isinstance(v, dict) else np.asarray(v)[i] for k, v in params.items()}


def kind_of(params: Tree, config: Decoder, i: int) -> Tree:
    """Layer `i` of a decoder whose layers differ: what all have, and its MLP or experts."""
    kind = config.kinds[i]
    shared = {k: v for k, v in params.items() if k not in ("mlp", "moe")}
    return layer_of(shared, i) | {kind: layer_of(params[kind], config.kinds[:i].count(kind))}


def gated(y: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = y @ gate
    return (g / (1 + np.exp(-g)) * (y @ up)) @ down


def mixture(config: Experts, w: Tree, y: np.ndarray) -> np.ndarray:
    """Token by token: the experts of the largest choices among the best groups, one after the other."""
    out, size = np.zeros_like(y), config.count // config.groups
    for i, logits in enumerate(y @ w["router"]):
        p = softmax(logits) if config.scores == "softmax" else 1 / (1 + np.exp(-logits))
        choice = p + w.get("bias", 0)
        of_group = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(config.groups)]
        groups = np.argsort(of_group)[::-1][: config.chosen_groups]
        among = [e for e in range(config.count) if e // size in groups]
        best = sorted(among, key=lambda e, choice=choice: -choice[e])[: config.per_token]
        total = sum(p[e] for e in best) if config.renormalise else 1.0
        for e in best:
            out[i] += config.scale * p[e] / total * gated(y[i], w["gate"][e], w["up"][e], w["down"][e])
        if "shared" in w:
            share = 1 / (1 + np.exp(-(y[i] @ w["shared_gate"]))) if config.shared_gate else 1.0
            out[i] += share * gated(y[i], **w["shared"])
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x: np.ndarray, w: Tree, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> list[float]:
    """One rotary frequency after the other."""
    found = []
    for i in range(0, dim, 2):
        f = 1.0 / theta ** (i / dim)
        if scaling is not None and scaling.kind == "linear":
            f /= scaling.factor
        elif scaling is not None:
            wavelength = 2 * math.pi / f
            low = scaling.original_length / scaling.low_frequency_factor
            high = scaling.original_length / scaling.high_frequency_factor
            if wavelength > low:
                f /= scaling.factor
            elif wavelength >= high:
                smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
                    scaling.high_frequency_factor - scaling.low_frequency_factor
                )
                f = (1 - smooth) * f / scaling.factor + smooth * f
        found.append(f)
    return found


def decoder_row(config: Decoder, params: Tree, x: np.ndarray) -> np.ndarray:
    """Normed last hidden states [s, d] of ONE unpacked row of embeddings [s, d]."""
    s, h, group = len(x), config.num_heads, config.num_heads // config.num_kv_heads
    k_dim = config.head_dim
    turn = np.exp(1j * np.outer(np.arange(s), inverse_frequencies(k_dim, config.rope_theta, config.rope_scaling)))

    def rotated(y: np.ndarray) -> np.ndarray:
        z = (y[:, : k_dim // 2] + 1j * y[:, k_dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    for i in range(config.num_layers):
        w = kind_of(params["layers"], config, i)
        a, y = w["attention"], rms_norm(x, w["attention_norm"], config.norm_eps)
        out = np.zeros_like(x)
        for head in range(h):
            q, k, v = y @ a["q"][:, head], y @ a["k"][:, head // group], y @ a["v"][:, head // group]
            if config.attention_bias:
                q, k, v = q + a["q_bias"][head], k + a["k_bias"][head // group], v + a["v_bias"][head // group]
            if config.qk_norm:
                q, k = rms_norm(q, a["q_norm"], config.norm_eps), rms_norm(k, a["k_norm"], config.norm_eps)
            logits = rotated(q) @ rotated(k).T / math.sqrt(k_dim)
            for i_q in range(s):
                for i_k in range(s):
                    if i_k > i_q or (config.sliding_window is not None and i_k <= i_q - config.sliding_window):
                        logits[i_q, i_k] = -np.inf
            out += softmax(logits) @ v @ a["o"][head]
        x = x + out
        y = rms_norm(x, w["mlp_norm"], config.norm_eps)
        x = x + (mixture(config.experts, w["moe"], y) if "moe" in w else gated(y, **w["mlp"]))
    return rms_norm(x, np.asarray(params["last"]["norm"]), config.norm_eps)


def vit_picture(config: ViT, params: Tree, pixels: np.ndarray) -> np.ndarray:
    """Projected tokens of ONE picture [height, width, 3]."""
    erf, first, p, eps = np.vectorize(math.erf), params["first"], config.patch_size, config.eps
    activation = {
        "siglip": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "clip": lambda y: y / (1 + np.exp(-1.702 * y)),
    }[config.variant]
    side = config.image_size // p
    patches = [pixels[r * p : r * p + p, c * p : c * p + p] for r in range(side) for c in range(side)]
    x = np.stack([np.einsum("ijc,ijcd->d", patch, first["patch"]) for patch in patches])
    if config.variant == "clip":
        x = layer_norm(np.concatenate([first["class_token"][None], x]) + first["position"], first["pre_norm"], eps)
    else:
        x = x + first["patch_bias"] + first["position"]
    states = [x]
    for i in range(len(params["layers"]["mlp"]["up"])):
        w = layer_of(params["layers"], i)
        a, y = w["attention"], layer_norm(x, w["attention_norm"], eps)
        for head in range(config.num_heads):
            q, k, v = (y @ a[n][:, head] + a[f"{n}_bias"][head] for n in "qkv")
            x = x + softmax(q @ k.T / math.sqrt(q.shape[1])) @ v @ a["o"][head]
        x = x + a["o_bias"]
        y, m = layer_norm(x, w["mlp_norm"], eps), w["mlp"]
        x = x + activation(y @ m["up"] + m["up_bias"]) @ m["down"] + m["down_bias"]
        states.append(x)
    states += [np.full_like(x, np.nan)] * (config.num_layers + 1 - len(states))  # not built: must not be read
    w = params["last"]["projector"]
    layers = config.feature_layer if isinstance(config.feature_layer, tuple) else (config.feature_layer,)
    y = np.concatenate([states[i] for i in layers], -1)[config.num_tokens - config.rows :] @ w["in"]
    y = y + w.get("in_bias", 0)
    return (y * 0.5 * (1 + erf(y / math.sqrt(2)))) @ w["out"] + w.get("out_bias", 0)


def whisper_clip(config: Whisper, params: Tree, mel: np.ndarray, frames: int) -> np.ndarray:
    """Projected rows of ONE clip of `frames` frames; `mel` [context, mels] goes on behind it."""
    erf, first = np.vectorize(math.erf), params["first"]
    gelu = lambda y: y * 0.5 * (1 + erf(y / math.sqrt(2)))

    def convolution(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
        x = np.pad(x, ((1, 1), (0, 0)))
        return np.stack([np.einsum("ki,kio->o", x[t : t + 3], kernel) + bias for t in range(0, len(x) - 2, stride)])

    x = gelu(convolution(mel, first["conv1"], first["conv1_bias"], 1))
    x = gelu(convolution(x, first["conv2"], first["conv2_bias"], 2))
    x = x + first["position"][: len(x)]
    if config.variant == "qwen2_audio":
        x = x[: (frames - 1) // 2 + 1]  # the others are seen by none of these
    for i in range(config.num_layers):
        w = layer_of(params["layers"], i)
        a, y = w["attention"], layer_norm(x, w["attention_norm"], 1e-5)
        for head in range(config.num_heads):
            q, k, v = (y @ a[n][:, head] + (0 if n == "k" else a[f"{n}_bias"][head]) for n in "qkv")
            x = x + softmax(q @ k.T / math.sqrt(q.shape[1])) @ v @ a["o"][head]
        x = x + a["o_bias"]
        y, m = layer_norm(x, w["mlp_norm"], 1e-5), w["mlp"]
        x = x + gelu(y @ m["up"] + m["up_bias"]) @ m["down"] + m["down_bias"]
    if config.variant == "qwen2_audio":
        x = np.stack([(x[2 * r] + x[2 * r + 1]) / 2 for r in range((len(x) - 2) // 2 + 1)])
    x, w = layer_norm(x, params["last"]["norm"], 1e-5), params["last"]["projector"]
    if config.projector == "linear":
        return x @ w["weight"] + w["bias"]
    return gelu(x @ w["in"] + w["in_bias"]) @ w["out"] + w["out_bias"]
