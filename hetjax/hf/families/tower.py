"""What the vision towers share: a config of CLIP's form, most keys, and what lies behind the layer that is read."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families.family import HEAD_BIAS, HEADS, LINEAR, VECTOR, Family, Table
from hetjax.hf.fields import Config, only, present, refused
from models.vit import ViT

KEYS: Table = {
    "first/patch": ("embeddings.patch_embedding.weight", "y x c d -> d c y x"),
    "first/position": ("embeddings.position_embedding.weight", "n d -> n d"),
    "layers/attention_norm/scale": ("encoder.layers.N.layer_norm1.weight", VECTOR),
    "layers/attention_norm/bias": ("encoder.layers.N.layer_norm1.bias", VECTOR),
    "layers/attention/q": ("encoder.layers.N.self_attn.q_proj.weight", HEADS),
    "layers/attention/k": ("encoder.layers.N.self_attn.k_proj.weight", HEADS),
    "layers/attention/v": ("encoder.layers.N.self_attn.v_proj.weight", HEADS),
    "layers/attention/q_bias": ("encoder.layers.N.self_attn.q_proj.bias", HEAD_BIAS),
    "layers/attention/k_bias": ("encoder.layers.N.self_attn.k_proj.bias", HEAD_BIAS),
    "layers/attention/v_bias": ("encoder.layers.N.self_attn.v_proj.bias", HEAD_BIAS),
    "layers/attention/o": ("encoder.layers.N.self_attn.out_proj.weight", "h k d -> d (h k)"),
    "layers/attention/o_bias": ("encoder.layers.N.self_attn.out_proj.bias", VECTOR),
    "layers/mlp_norm/scale": ("encoder.layers.N.layer_norm2.weight", VECTOR),
    "layers/mlp_norm/bias": ("encoder.layers.N.layer_norm2.bias", VECTOR),
    "layers/mlp/up": ("encoder.layers.N.mlp.fc1.weight", LINEAR),
    "layers/mlp/up_bias": ("encoder.layers.N.mlp.fc1.bias", VECTOR),
    "layers/mlp/down": ("encoder.layers.N.mlp.fc2.weight", LINEAR),
    "layers/mlp/down_bias": ("encoder.layers.N.mlp.fc2.bias", VECTOR),
}
PREFIX = "vision_model."
ROOTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")  # of keys behind the prefix
BEHIND = re.compile(r"(post_layernorm\.|head\.|encoder\.layers\.\d+\.).+")  # of which some no model of ours reads
PAIRED = re.compile(r"text_model\..+|(text|visual)_projection\.weight|logit_scale|logit_bias")  # of the other half
DEFAULTS: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224
)


def family(
    variant: str,
    architecture: str,
    *,
    keys: Table,
    defaults: Config,
    fields: Config,
    pair_fields: tuple[str, ...] = ("vision_config",),
) -> Family:
    """A family of towers; `fields` are in each config of it, which says no more of them. Alone, the output of a tower
    stays as wide as it is."""
    kind = f"{variant}_vision_model"
    fixed = {name: defaults[name] for name in ("hidden_act", "layer_norm_eps")}

    def read(config: Config, where: str, **changes: Any) -> ViT:
        c = DEFAULTS | dict(defaults) | present(config)
        only(c, {"num_channels": 3, **fixed}, where)
        return _read(c, where, {"variant": variant, **changes})

    def write(model: ViT) -> dict[str, Any]:
        if model.experts is not None:
            raise ConvertError(
                "ViT.experts is set: no tower of transformers has experts; train without, or keep the run"
            )
        return {"model_type": kind, **_write(model), **fixed, **fields}

    return Family(
        kind=kind,
        part="vision",
        classes=(architecture,),
        holds=lambda model: model.variant == variant,
        keys={**KEYS, **keys},
        read=read,
        write=write,
        prefix=PREFIX,
        canonical=lambda key: PREFIX + key if key.startswith(ROOTS) else key,
        idle=BEHIND,
        beside=PAIRED,
        pair=variant,
        pair_fields=pair_fields,
        resized=("image_size",),
        shortened=_shortened,
    )


def _read(c: Config, where: str, changes: Config) -> ViT:
    for name in ("image_size", "patch_size"):
        if not isinstance(c[name], int):
            raise refused(where, name, c[name], "pictures and patches must be square, given as one number")
    sizes: dict[str, Any] = dict(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_width=c["intermediate_size"],
        output_width=c["hidden_size"],
    )
    return ViT(**(sizes | dict(changes)))


def _write(model: ViT) -> dict[str, Any]:
    return {
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_channels": 3,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "attention_dropout": 0.0,
    }


def _shortened(vit: ViT, came: Collection[str]) -> tuple[ViT, Mapping[str, tuple[tuple[int, ...], float]]]:
    """Layers behind those that are read are left out, and the last norm is the identity, unless all of that came."""
    built = vit.num_built
    if came and all(any(f".{i}." in key for key in came) for i in range(built, vit.num_layers)):
        return vit, {}
    shorter = dataclasses.replace(vit, num_layers=built, feature_layer=tuple(d - built - 1 for d in vit.depths))
    return shorter, {"post_layernorm.weight": ((vit.width,), 1.0), "post_layernorm.bias": ((vit.width,), 0.0)}
