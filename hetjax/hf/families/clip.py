"""CLIP's vision tower: a class token, a norm before the first layer, quick GELU."""

from hetjax.hf.families import tower
from hetjax.hf.families.family import VECTOR

FAMILY = tower.family(
    "clip",
    "CLIPVisionModel",
    keys={
        "first/class_token": ("embeddings.class_embedding", VECTOR),
        "first/pre_norm/scale": ("pre_layrnorm.weight", VECTOR),  # the hub's spelling
        "first/pre_norm/bias": ("pre_layrnorm.bias", VECTOR),
    },
    defaults=dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    fields={},
    pair_fields=("vision_config_dict", "vision_config"),  # of its first form, which all versions put before the other
)
