"""SigLIP's vision tower: patches with a bias, tanh GELU. It is made without a pooling head, which our models lack."""

from hetjax.hf.families import tower
from hetjax.hf.families.family import VECTOR

FAMILY = tower.family(
    "siglip",
    "SiglipVisionModel",
    keys={"first/patch_bias": ("embeddings.patch_embedding.bias", VECTOR)},
    defaults=dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    fields=dict(vision_use_head=False),
)
