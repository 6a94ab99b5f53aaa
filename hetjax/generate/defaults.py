"""What a folder's generation settings ask for, read where transformers reads them, and which of it is not done here.

generation_config.json decides; where there is none, the fields of config.json, and those in its text_config.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hetjax.generate.sample import Sampling
from hetjax.hf.errors import ConvertError
from hetjax.hf.source import Extras, read_json

FILE = "generation_config.json"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
LENGTHS = ("max_new_tokens", "max_length")  # the first counts
# Settings that change answers and are not computed -> the value with which they change none
NOT_DONE: dict[str, Any] = dict(
    num_beams=1,
    num_beam_groups=1,
    penalty_alpha=None,
    no_repeat_ngram_size=0,
    encoder_repetition_penalty=1.0,
    encoder_no_repeat_ngram_size=0,
    bad_words_ids=None,
    sequence_bias=None,
    min_length=0,
    min_new_tokens=None,
    forced_bos_token_id=None,
    forced_eos_token_id=None,
    forced_decoder_ids=None,
    exponential_decay_length_penalty=None,
    guidance_scale=None,
    stop_strings=None,
    watermarking_config=None,
)
DRAWS_NOT_DONE: dict[str, Any] = dict(min_p=None, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0, top_h=None)


class Penalties(NamedTuple):
    """What is done to the logits before a token is chosen, also of greedy answers."""

    repetition: float = 1.0  # those of tokens that were there are divided by it, or multiplied where negative
    suppressed: tuple[int, ...] = ()  # tokens that never come
    suppressed_first: tuple[int, ...] = ()  # tokens that do not come first


class Defaults(NamedTuple):
    """The settings of a folder, or of a run, which are those that its export has."""

    stops: tuple[int, ...]  # ids that end an answer
    penalties: Penalties = Penalties()
    sampling: Sampling = Sampling()  # how transformers would draw if nothing else is said
    ignored: tuple[str, ...] = ()  # settings that are not done, in words
    length: str = ""  # where transformers would end an answer if nothing else is said, in words


def read(extras: Extras) -> Defaults:
    """The settings of a folder. Raises ConvertError for what cannot be."""
    settings = _settings(extras)
    draws = bool(settings.get("do_sample"))
    plain = NOT_DONE | (DRAWS_NOT_DONE if draws else {})
    if draws and settings.get("temperature") == 0:  # which transformers refuses, and nothing is left to draw
        draws, plain = False, plain | dict(temperature=1.0)
    ignored = [f"{name}={settings[name]!r}" for name in plain if settings.get(name) not in (None, plain[name])]
    try:
        penalties = Penalties(
            float(settings.get("repetition_penalty") or 1.0),
            tuple(map(int, settings.get("suppress_tokens") or ())),
            tuple(map(int, settings.get("begin_suppress_tokens") or ())),
        )
        sampling = _sampling(settings) if draws else Sampling()
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{FILE}: {error}; mend the file") from error
    length = next((f"{name}={settings[name]}" for name in LENGTHS if settings.get(name) is not None), "")
    return Defaults(_ids(settings.get("eos_token_id")), penalties, sampling, tuple(ignored), length)


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """With transformers' own default where the folder says nothing: the 50 likeliest tokens."""
    told = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    return Sampling(float(told.get("temperature", 1.0)), int(told.get("top_k", 50)), float(told.get("top_p", 1.0)))


def _settings(extras: Extras) -> dict[str, Any]:
    if FILE in extras.files:
        return read_json(extras.files[FILE])
    config = extras.config or {}
    places = (config.get("text_config") or {}, config)
    return {name: value for place in places for name, value in place.items() if value is not None}


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
