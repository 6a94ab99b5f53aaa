"""Models of a folder as settings, so that no size of it is written twice:

    llm/experiment.LanguageModel.model = @pretrained.decoder()
    pretrained.decoder.path = "data/cache/smollm2"
    vision/experiment.Encoder.model = @pretrained.encoder()
    pretrained.encoder.path = "models/siglip"
    pretrained.encoder.settings = {"output_width": 576}

    vision/experiment.Encoder.mean = @pretrained.mean()
    pretrained.mean.path = "models/siglip"

and so std, shortest_edge, pad_to_square and resampling. A path is whatever `init_from` takes. Only settings come from
it; `Experiment.init_from` brings the parameters.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hetjax.data import Pictures
from hetjax.hf import pictures
from hetjax.hf.errors import ConvertError
from hetjax.hf.initial import has_projector
from hetjax.hf.stored import open_source
from hetjax.run.ginfile import nearest
from models.decoder import Decoder


def decoder(path: str) -> Decoder:
    """The settings of the decoder at `path`. Raises ConvertError if there is none."""
    found = [model for model in open_source(path).models.values() if isinstance(model, Decoder)]
    if len(found) != 1:
        raise ConvertError(f"pretrained.decoder.path={path!r} holds {len(found)} decoders; name a source with one")
    return found[0]


def encoder(path: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The settings of the encoder at `path`, with some of them changed: a tower alone leaves its projector's open.

    Raises ConvertError if there is no encoder, or several, or if the projector's `output_width` is still open."""
    source = open_source(path)
    found = {name: model for name, model in source.models.items() if not isinstance(model, Decoder)}
    if len(found) != 1:
        raise ConvertError(f"pretrained.encoder.path={path!r} holds {len(found)} encoders; name a source with one")
    ((name, model),) = found.items()
    fields = [field.name for field in dataclasses.fields(model)]
    for setting in settings:
        if setting not in fields:
            near = nearest(setting, fields)
            raise ConvertError(f"pretrained.encoder.settings: {type(model).__name__} has no field {setting}{near}")
    if "output_width" not in settings and not has_projector(source, name):
        raise ConvertError(
            f"pretrained.encoder.settings lacks output_width: {path} holds a tower without a projector; set it to the "
            "language model's width"
        )
    return dataclasses.replace(model, **settings)


def mean(path: str) -> tuple[float, float, float]:
    """What the picture processor at `path` takes off. Raises ConvertError if it has none, or one that is not read."""
    return _pictures(path).mean


def std(path: str) -> tuple[float, float, float]:
    """What the picture processor at `path` divides by. Raises as `mean`."""
    return _pictures(path).std


def shortest_edge(path: str) -> int | None:
    """The shorter side of which the picture processor at `path` cuts the middle, if it does. Raises as `mean`."""
    return _pictures(path).shortest_edge


def pad_to_square(path: str) -> bool:
    """Whether the picture processor at `path` pads pictures to a square. Raises as `mean`."""
    return _pictures(path).pad_to_square


def resampling(path: str) -> str:
    """How the picture processor at `path` resizes. Raises as `mean`."""
    return _pictures(path).resampling


def _pictures(path: str) -> Pictures:
    for extras in open_source(path).extras.values():
        reader = pictures.read(extras.files)
        if reader is not None:
            return reader
    raise ConvertError(f"{path} has no {pictures.FILE}, which says how pictures are read; set mean and std yourself")
