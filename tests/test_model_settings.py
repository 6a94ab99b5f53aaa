"""Settings that no model can have are refused before anything is built: named, with the rule and a way out."""

import dataclasses
import re
from typing import Any

import pytest
from test_models import DECODER, LLAMA3, VIT

from models.moe import Experts

EXPERTS = Experts(4, 2, 8)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DECODER, {"num_kv_heads": 3}, "Decoder.num_heads=4 is not a multiple of num_kv_heads=3: .*; change either"),
        (
            DECODER,
            {"width": 18, "head_dim": None},
            "Decoder.width=18 is not a multiple of num_heads=4; .* set head_dim",
        ),
        (DECODER, {"head_dim": 5}, "Decoder.head_dim=5 is odd, .*; make it even"),
        (DECODER, {"head_dim": 0}, "Decoder.head_dim=0; it must be a whole number of at least 1"),
        (DECODER, {"num_layers": 0}, "Decoder.num_layers=0; it must be a whole number of at least 1"),
        (DECODER, {"num_layers": 10**9}, "Decoder.num_layers=1000000000; a model has at most 10000 layers"),
        (DECODER, {"mlp_width": 1.5}, "Decoder.mlp_width=1.5; it must be a whole number of at least 1"),
        (DECODER, {"sliding_window": 0}, "Decoder.sliding_window=0; it must be a whole number of at least 1"),
        (DECODER, {"rope_theta": 0.0}, "Decoder.rope_theta=0.0; it must be positive"),
        (DECODER, {"norm_eps": -1.0}, "Decoder.norm_eps=-1.0; it must be positive"),
        (DECODER, {"experts": Experts(4, 2, 8, dense_layers=(2,))}, "Experts.dense_layers names layer 2; .* 0 to 1"),
        (DECODER, {"experts": Experts(4, 2, 8, dense_layers=(0, 1))}, "Experts.dense_layers names all 2 layers, so"),
        (EXPERTS, {"per_token": 5}, "Experts.per_token=5 is more than count=4; a token goes to an expert once"),
        (EXPERTS, {"width": 0}, "Experts.width=0; it must be a whole number of at least 1"),
        (VIT, {"patch_size": 9}, "ViT.image_size=8 holds no patch of patch_size=9; make it that or more"),
        (VIT, {"num_heads": 3}, "ViT.width=16 is not a multiple of num_heads=3; change either"),
        (VIT, {"variant": "dino"}, "ViT.variant='dino'; it must be one of siglip, clip"),
        (VIT, {"select": "cls"}, "ViT.select='cls'; it must be one of full, default"),
        (VIT, {"feature_layer": 3}, "ViT.feature_layer=3; it must be a number from -3 to 2, .* of num_layers=2, 0: "),
        (VIT, {"feature_layer": [-1, -4]}, r"ViT.feature_layer=\[-1, -4\]; it must be a number from -3 to 2"),
        (VIT, {"feature_layer": ()}, r"ViT.feature_layer=\(\) names no hidden state, and the projector reads at least"),
        (VIT, {"projector_width": 0}, "ViT.projector_width=0; it must be a whole number of at least 1"),
        (LLAMA3, {"kind": "yarn"}, "RopeScaling.kind='yarn'; it must be one of llama3, linear"),
        (LLAMA3, {"factor": 0.0}, "RopeScaling.factor=0.0; it must be positive"),
        (
            LLAMA3,
            {"high_frequency_factor": 1.0},
            "RopeScaling.high_frequency_factor=1.0 must be larger than .*=1.0; Llama",
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_a_bad_setting_is_refused_with_its_rule(config: Any, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(config, **changes)
    assert re.match(message, str(caught.value))
