"""LLaVA: any decoder with a CLIP or SigLIP tower and a projector of two linear maps with a GELU between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetjax.data import Pictures
from hetjax.hf import pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import clip, siglip
from hetjax.hf.families.family import LINEAR, VECTOR, Whole
from hetjax.hf.fields import Config, present, refused
from hetjax.hf.parts import Parts
from hetjax.hf.source import read_json
from hetjax.run.experiment import Encoder

DEFAULTS: dict[str, Any] = dict(
    projector_hidden_act="gelu",
    multimodal_projector_bias=True,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
)
# What transformers' processor takes for fields that processor_config.json leaves out
ABSENT = dict(processor_class="LlavaProcessor", image_token="<image>", num_additional_image_tokens=0)
# The tower of a config without vision_config: CLIP ViT-L/14 at 336 pixels
TOWER: dict[str, Any] = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


def choices(config: Config, where: str) -> dict[str, Any]:
    """What the tower's projector reads and computes. Raises ConvertError for another activation."""
    c = DEFAULTS | present(config)
    if c["projector_hidden_act"] != "gelu":
        raise refused(where, "projector_hidden_act", c["projector_hidden_act"], "only the exact 'gelu' is computed")
    return dict(
        feature_layer=c["vision_feature_layer"],
        select=c["vision_feature_select_strategy"],
        projector_bias=c["multimodal_projector_bias"],
    )


def write(parts: Parts) -> dict[str, Any]:
    """The fields of the projector."""
    vit = parts.vision
    assert vit is not None
    return {
        "image_seq_length": vit.rows,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": vit.projector_bias,
        "vision_feature_layer": vit.feature_layer,
        "vision_feature_select_strategy": vit.select,
    }


def check(parts: Parts) -> None:
    """Raises ConvertError unless there is one projector, as wide inside as the language model."""
    vit = parts.vision
    assert vit is not None
    if vit.deepstack:
        raise ConvertError(
            f"ViT.deepstack={list(vit.deepstack)}: LLaVA adds nothing behind the language model's layers, nor does "
            "another family with such a tower; keep the checkpoint, or train with deepstack=()"
        )
    if vit.hidden != vit.output_width:
        raise ConvertError(
            f"ViT.projector_width={vit.hidden}: LLaVA's projector is as wide as the language model inside; "
            f"only projector_width={vit.output_width} (or None) can be exported"
        )


def processor(encoder: Encoder) -> dict[str, Any]:
    """The processor's files: pictures and prompts as the loader reads them."""
    reader, model = encoder.items.reader, encoder.model
    assert isinstance(reader, Pictures)
    return {
        pictures.FILE: pictures.write(reader),
        pictures.NESTED: {
            "processor_class": "LlavaProcessor",
            "image_token": encoder.placeholder,
            "patch_size": model.patch_size,
            "vision_feature_select_strategy": model.select,
            "num_additional_image_tokens": int(model.has_class_token),
        },
    }


def serves(encoder: Encoder, files: Mapping[str, Path]) -> bool:
    """Whether the processor's files read pictures as the loader does, and give each as many tokens as it has rows."""
    if not {pictures.FILE, pictures.NESTED} <= files.keys():
        return False
    prompts, ours = ABSENT | present(read_json(files[pictures.NESTED])), processor(encoder)[pictures.NESTED]
    try:
        return prompts.items() >= ours.items() and pictures.read(files) == encoder.items.reader
    except ConvertError:
        return False


FAMILY = Whole(
    kind="llava",
    architecture="LlavaForConditionalGeneration",
    encoder="vision",
    item="image",
    fields={"llm": "text_config", "vision": "vision_config"},
    defaults={"llm": {"model_type": "llama"}, "vision": TOWER},
    kinds=(clip.FAMILY.kind, siglip.FAMILY.kind),
    holders={"llm": "language_model.", "vision": "vision_tower."},
    projector={
        "last/projector/in": ("linear_1.weight", LINEAR),
        "last/projector/in_bias": ("linear_1.bias", VECTOR),
        "last/projector/out": ("linear_2.weight", LINEAR),
        "last/projector/out_bias": ("linear_2.bias", VECTOR),
    },
    ties=True,
    choices=choices,
    write=write,
    check=check,
    chat_template=None,
    processor=processor,
    serves=serves,
)
