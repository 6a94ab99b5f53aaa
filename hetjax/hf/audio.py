"""Between preprocessor_config.json and how a run reads sounds. What our reader cannot do is refused by field."""

from collections.abc import Mapping
from typing import Any

from hetjax.data import Sounds
from hetjax.data.sounds import HOP, RATE, WINDOW
from hetjax.hf.errors import ConvertError
from models.whisper import Whisper

PROCESSOR = "Qwen2AudioProcessor"
FEATURES: dict[str, Any] = dict(sampling_rate=RATE, n_fft=WINDOW, hop_length=HOP, padding_value=0.0)


def reader(settings: Mapping[str, Any], model: Whisper, where: str) -> Sounds:
    """The reader that preprocessor_config.json describes. Raises ConvertError for features that are not computed."""
    same = FEATURES | {"feature_size": model.num_mels, "do_normalize": False, "dither": 0.0}
    for name, value in same.items():
        if settings.get(name, value) != value:
            raise ConvertError(f"{where}: {name}={settings[name]!r}: only {value!r} is computed")
    return Sounds(model.num_mels, model.frames, model.context, model.rows_of)


def features(reader: Sounds, model: Whisper) -> dict[str, Any]:
    """preprocessor_config.json: features as the loader makes them."""
    samples = 2 * model.num_positions * HOP
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": PROCESSOR,
        "feature_size": reader.num_mels,
        **FEATURES,
        "chunk_length": samples // RATE if samples % RATE == 0 else samples / RATE,
        "n_samples": samples,
        "nb_max_frames": 2 * model.num_positions,
        "padding_side": "right",
        "return_attention_mask": True,
    }
