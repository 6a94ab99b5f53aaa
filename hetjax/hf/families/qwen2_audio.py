"""Qwen2-Audio: any decoder with its variant of Whisper's encoder and one linear map between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetjax.data import Sounds
from hetjax.hf import audio, pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import whisper
from hetjax.hf.families.family import LINEAR, VECTOR, Whole
from hetjax.hf.parts import Parts
from hetjax.hf.source import read_json
from hetjax.run.experiment import Encoder

# As Qwen2AudioProcessor.default_chat_template of transformers: folders of the hub have none
CHAT_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}"
    "{{ content['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% endif %}"
)


def check(parts: Parts) -> None:
    """Raises ConvertError unless the class computes what the encoder does beside a language model."""
    assert parts.audio is not None
    for name, wanted in (("variant", "qwen2_audio"), ("projector", "linear")):
        value = getattr(parts.audio, name)
        if value != wanted:
            raise ConvertError(
                f"Whisper.{name}={value!r}: the one class that holds an audio encoder beside a language "
                f"model, Qwen2-Audio's, has {wanted!r}; train with that, or export the modules apart (--modules)"
            )


def processor(encoder: Encoder) -> dict[str, Any]:
    """The processor's files: a clip's rows stand where its placeholder stood, without tokens around them."""
    reader = encoder.items.reader
    assert isinstance(reader, Sounds)
    return {
        pictures.FILE: audio.features(reader, encoder.model),
        pictures.NESTED: {
            "processor_class": audio.PROCESSOR,
            "audio_token": encoder.placeholder,
            "audio_bos_token": "",
            "audio_eos_token": "",
        },
    }


def serves(encoder: Encoder, files: Mapping[str, Path]) -> bool:
    """Whether the processor's files are those of the class."""
    return pictures.FILE in files and read_json(files[pictures.FILE]).get("processor_class") == audio.PROCESSOR


FAMILY = Whole(
    kind="qwen2_audio",
    architecture="Qwen2AudioForConditionalGeneration",
    encoder="audio",
    item="audio",
    fields={"llm": "text_config", "audio": "audio_config"},
    defaults={"llm": {"model_type": "qwen2"}, "audio": {"model_type": whisper.ENCODER.kind}},
    kinds=(whisper.ENCODER.kind,),
    holders={"llm": "language_model.", "audio": "audio_tower."},
    projector={
        "last/projector/weight": ("linear.weight", LINEAR),
        "last/projector/bias": ("linear.bias", VECTOR),
    },
    ties=False,  # without a copy the head would have random values in transformers 5
    choices=lambda config, where: {},
    write=lambda parts: {},
    check=check,
    chat_template=CHAT_TEMPLATE,
    processor=processor,
    serves=serves,
)
