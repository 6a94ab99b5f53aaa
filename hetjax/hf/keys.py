"""Where every parameter of ours lies in a Hugging Face folder: one table per kind of module.

Names are those of a checkpoint without module ("layers/attention/q" of layer 3 is "layers/0003/attention/q"). Keys are
those of the hub and of transformers 4.x files (layout A), the one spelling that every version reads. Files of
transformers 5 (layout C) and state dicts in memory (B) spell some of them otherwise: `canonical` translates.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from hetjax.hf import audio
from hetjax.hf.pattern import Pattern, parse
from hetjax.hf.source import Sliceable
from hetjax.run.names import flat
from models.decoder import Decoder
from models.vit import ViT
from models.whisper import Whisper

Model = Decoder | ViT | Whisper
LLM, TOWER, PROJECTOR = "language_model.", "vision_tower.vision_model.", "multi_modal_projector."
HEARING, WHISPER = "audio_tower.", "model.encoder."  # of Qwen2-Audio; of Whisper
VECTOR, LINEAR = "a -> a", "i o -> o i"

DECODER = {
    "first/embed": ("model.embed_tokens.weight", "v d -> v d"),
    "layers/attention_norm": ("model.layers.N.input_layernorm.weight", VECTOR),
    "layers/attention/q": ("model.layers.N.self_attn.q_proj.weight", "d h k -> (h k) d"),
    "layers/attention/k": ("model.layers.N.self_attn.k_proj.weight", "d h k -> (h k) d"),
    "layers/attention/v": ("model.layers.N.self_attn.v_proj.weight", "d h k -> (h k) d"),
    "layers/attention/q_bias": ("model.layers.N.self_attn.q_proj.bias", "h k -> (h k)"),
    "layers/attention/k_bias": ("model.layers.N.self_attn.k_proj.bias", "h k -> (h k)"),
    "layers/attention/v_bias": ("model.layers.N.self_attn.v_proj.bias", "h k -> (h k)"),
    "layers/attention/q_norm": ("model.layers.N.self_attn.q_norm.weight", VECTOR),
    "layers/attention/k_norm": ("model.layers.N.self_attn.k_norm.weight", VECTOR),
    "layers/attention/o": ("model.layers.N.self_attn.o_proj.weight", "h k d -> d (h k)"),
    "layers/mlp_norm": ("model.layers.N.post_attention_layernorm.weight", VECTOR),
    "layers/mlp/gate": ("model.layers.N.mlp.gate_proj.weight", LINEAR),
    "layers/mlp/up": ("model.layers.N.mlp.up_proj.weight", LINEAR),
    "layers/mlp/down": ("model.layers.N.mlp.down_proj.weight", LINEAR),
    "last/norm": ("model.norm.weight", VECTOR),
    "last/head": ("lm_head.weight", LINEAR),
}

# Each expert is a tensor of its own, E its number: rows of one array of ours.
MIXTRAL = {
    "layers/moe/router": ("model.layers.N.block_sparse_moe.gate.weight", LINEAR),
    "layers/moe/gate": ("model.layers.N.block_sparse_moe.experts.E.w1.weight", LINEAR),
    "layers/moe/up": ("model.layers.N.block_sparse_moe.experts.E.w3.weight", LINEAR),
    "layers/moe/down": ("model.layers.N.block_sparse_moe.experts.E.w2.weight", LINEAR),
}
QWEN3_MOE = {
    "layers/moe/router": ("model.layers.N.mlp.gate.weight", LINEAR),
    "layers/moe/gate": ("model.layers.N.mlp.experts.E.gate_proj.weight", LINEAR),
    "layers/moe/up": ("model.layers.N.mlp.experts.E.up_proj.weight", LINEAR),
    "layers/moe/down": ("model.layers.N.mlp.experts.E.down_proj.weight", LINEAR),
}

VISION = {
    "first/patch": ("embeddings.patch_embedding.weight", "y x c d -> d c y x"),
    "first/patch_bias": ("embeddings.patch_embedding.bias", VECTOR),
    "first/position": ("embeddings.position_embedding.weight", "n d -> n d"),
    "first/class_token": ("embeddings.class_embedding", VECTOR),
    "first/pre_norm/scale": ("pre_layrnorm.weight", VECTOR),  # the hub's spelling
    "first/pre_norm/bias": ("pre_layrnorm.bias", VECTOR),
    "layers/attention_norm/scale": ("encoder.layers.N.layer_norm1.weight", VECTOR),
    "layers/attention_norm/bias": ("encoder.layers.N.layer_norm1.bias", VECTOR),
    "layers/attention/q": ("encoder.layers.N.self_attn.q_proj.weight", "d h k -> (h k) d"),
    "layers/attention/k": ("encoder.layers.N.self_attn.k_proj.weight", "d h k -> (h k) d"),
    "layers/attention/v": ("encoder.layers.N.self_attn.v_proj.weight", "d h k -> (h k) d"),
    "layers/attention/q_bias": ("encoder.layers.N.self_attn.q_proj.bias", "h k -> (h k)"),
    "layers/attention/k_bias": ("encoder.layers.N.self_attn.k_proj.bias", "h k -> (h k)"),
    "layers/attention/v_bias": ("encoder.layers.N.self_attn.v_proj.bias", "h k -> (h k)"),
    "layers/attention/o": ("encoder.layers.N.self_attn.out_proj.weight", "h k d -> d (h k)"),
    "layers/attention/o_bias": ("encoder.layers.N.self_attn.out_proj.bias", VECTOR),
    "layers/mlp_norm/scale": ("encoder.layers.N.layer_norm2.weight", VECTOR),
    "layers/mlp_norm/bias": ("encoder.layers.N.layer_norm2.bias", VECTOR),
    "layers/mlp/up": ("encoder.layers.N.mlp.fc1.weight", LINEAR),
    "layers/mlp/up_bias": ("encoder.layers.N.mlp.fc1.bias", VECTOR),
    "layers/mlp/down": ("encoder.layers.N.mlp.fc2.weight", LINEAR),
    "layers/mlp/down_bias": ("encoder.layers.N.mlp.fc2.bias", VECTOR),
}

PROJECTION = {
    "last/projector/in": ("linear_1.weight", LINEAR),
    "last/projector/in_bias": ("linear_1.bias", VECTOR),
    "last/projector/out": ("linear_2.weight", LINEAR),
    "last/projector/out_bias": ("linear_2.bias", VECTOR),
}

# Settings that a tower alone leaves open, and of an audio encoder also how its rows are made and how long clips are.
OF_PROJECTOR = ("output_width", "projector_width", "projector_bias", "feature_layer", "select", "projector", "variant")
OF_DATA = ("max_frames",)  # settings that change no parameter

# What a vision tower's file holds beside the table, and no vision-language model reads.
IDLE = re.compile(r"(post_layernorm\.|head\.|encoder\.layers\.\d+\.).+")
PAIRED = re.compile(r"text_model\..+|(text|visual)_projection\.weight|logit_scale|logit_bias")  # CLIP's other half
ROOTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")  # of a tower's keys
BUFFERS = re.compile(r".*(embeddings\.position_ids|rotary_emb\.inv_freq)")  # constants that old files carry


class Place(NamedTuple):
    """One array of ours in a folder: a tensor, or one for each of the rows of its first dim."""

    keys: tuple[str, ...]  # in layout A
    pattern: Pattern  # of a tensor
    shape: tuple[int, ...]  # ours
    by_row: bool = False

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape, in our dims, of what a tensor holds."""
        return self.shape[1:] if self.by_row else self.shape

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.pattern.torch_shape(self.inner)

    def to_torch(self, array: Sliceable, row: int) -> np.ndarray:
        """The values of the tensor `keys[row]`."""
        inside = (slice(None),) * len(self.inner)
        return self.pattern.to_torch(array[(slice(row, row + 1), *inside)][0] if self.by_row else array[inside])


@dataclasses.dataclass(frozen=True)
class Parts:
    """The models that a folder holds, by module name: a language model with an encoder, or either alone.

    An encoder alone has no projector: that of `vision` or `audio` is not stored."""

    llm: Decoder | None = None
    vision: ViT | None = None
    audio: Whisper | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a language model with an encoder."""
        return self.llm is not None and len(self.models) > 1

    @property
    def models(self) -> dict[str, Model]:
        """Module name -> model."""
        all_of = {"llm": self.llm, "vision": self.vision, "audio": self.audio}
        return {name: model for name, model in all_of.items() if model is not None}


def places(parts: Parts) -> dict[str, Place]:
    """Name ("llm/layers/0003/attention/q") -> where the array lies, for every array of the models."""
    found: dict[str, Place] = {}
    for module, model in parts.models.items():
        tables = _tables(model, parts.whole)
        for name, shape in shapes(model).items():
            layer = re.match(r"layers/(\d+)/", name)
            general = name.replace(f"/{layer[1]}/", "/", 1) if layer else name
            if general not in tables:
                continue
            key, pattern = tables[general]
            if layer:
                key = key.replace(".N.", f".{int(layer[1])}.")
            by_row = ".E." in key
            each = tuple(key.replace(".E.", f".{row}.") for row in range(shape[0] if by_row else 1))
            found[f"{module}/{name}"] = Place(each, parse(pattern), shape, by_row)
    return found


def _tables(model: Model, whole: bool) -> dict[str, tuple[str, str]]:
    if isinstance(model, Decoder):
        experts = QWEN3_MOE if model.qk_norm else MIXTRAL
        return _prefixed(DECODER | experts, LLM if whole else "")
    if isinstance(model, Whisper):
        own = WHISPER if model.variant == "whisper" else ""
        encoder = _prefixed(audio.TABLE, HEARING if whole else own)
        return encoder | _prefixed(audio.PROJECTION, PROJECTOR) if whole else encoder
    tower = _prefixed(VISION, TOWER if whole else "vision_model.")
    return tower | _prefixed(PROJECTION, PROJECTOR) if whole else tower


def _prefixed(table: Mapping[str, tuple[str, str]], prefix: str) -> dict[str, tuple[str, str]]:
    return {name: (prefix + key, pattern) for name, (key, pattern) in table.items()}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shape of every array that the model stores, by name: its layers one by one, a tied head not at all."""
    import jax  # here: the tables are read without it

    definition = model.module("float32")
    key = jax.eval_shape(lambda: jax.random.key(0))  # abstract: settings are read before the backend starts
    found: dict[str, tuple[int, ...]] = {}
    kept = functools.cache(lambda init: list(flat(jax.eval_shape(init, key))))
    layers = {f"layers/{i:04d}": part for i, part in enumerate(definition.layers)}
    for name, part in {"first": definition.first, **layers, "last": definition.last}.items():
        found |= {f"{name}/{path}": tuple(leaf.shape) for path, leaf in kept(part.init)}
    return {name: shape for name, shape in found.items() if name.removeprefix("last/") not in definition.tied}


def canonical(key: str, parts: Parts) -> str:
    """The key as layout A spells it."""
    if parts.whole:
        if key.startswith("model."):  # in memory: model.language_model.layers..., and the head beside it
            key = key.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        elif key == "lm_head.weight":
            key = LLM + key
        bare = "vision_tower."
    elif parts.vision is not None:
        bare = ""
    elif parts.audio is not None and parts.audio.variant == "whisper":
        return key if key.startswith(("model.", "proj_out.")) else f"model.{key}"  # WhisperModel's are bare
    else:
        return key
    inside = key.removeprefix(bare)
    return f"{bare}vision_model.{inside}" if key.startswith(bare) and inside.startswith(ROOTS) else key


def idle(keys: Iterable[str], parts: Parts) -> list[str]:
    """Those of `keys` (layout A) that belong to the folder's tower, or to what is beside it, and not to the model."""
    if parts.audio is not None and not parts.whole:
        return [key for key in keys if key.startswith(("model.decoder.", "proj_out."))]
    if parts.vision is None:
        return []
    prefix = TOWER if parts.whole else "vision_model."
    mine = lambda key: key.startswith(prefix) and IDLE.fullmatch(key.removeprefix(prefix))
    return [key for key in keys if mine(key) or (not parts.whole and PAIRED.fullmatch(key))]
