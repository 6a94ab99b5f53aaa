"""Models of a folder as settings, so that no size of it is written twice:

    llm/experiment.LanguageModel.model = @pretrained.decoder()
    pretrained.decoder.path = "data/cache/smollm2"
    vision/experiment.Encoder.model = @pretrained.encoder()
    pretrained.encoder.path = "models/siglip"
    pretrained.encoder.settings = {"output_width": 576}

    vision/experiment.Encoder.mean = @pretrained.mean()
    pretrained.mean.path = "models/siglip"

    settings.DataConfig.template = @pretrained.template()
    pretrained.template.path = "data/cache/smollm2"

and so std, shortest_edge, pad_to_square and resampling. A path is whatever `init_from` takes. Only settings come from
it; `Experiment.init_from` brings the parameters.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from hetjax.data import ChatTemplate, Pictures, Template, writing
from hetjax.data.problems import SampleError
from hetjax.data.script import Script
from hetjax.data.tokens import open_tokenizer
from hetjax.hf import pictures, prompts
from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.initial import has_projector
from hetjax.hf.processor import item_token
from hetjax.hf.stored import Workdir, open_source
from hetjax.run.ginfile import nearest
from models.decoder import Decoder

PLAIN = (
    "a training needs one: set DataConfig.template = @settings.Template() with its texts as human_prefix, human_suffix "
    "and answer_suffix, and with the tokenizer's end_token"
)


def decoder(
    path: str, balance_loss: float | None = None, z_loss: float | None = None, bias_rate: float | None = None
) -> Decoder:
    """The settings of the decoder at `path`; what balances its experts' routers is its own too where it is None: a
    selection bias stays as it is.

    Raises ConvertError if there is no decoder, or none with experts where one of these is set."""
    found = [model for model in open_source(path).models.values() if isinstance(model, Decoder)]
    if len(found) != 1:
        raise ConvertError(f"pretrained.decoder.path={path!r} holds {len(found)} decoders; name a source with one")
    (model,) = found
    given = dict(balance_loss=balance_loss, z_loss=z_loss, bias_rate=bias_rate)
    training: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not training:
        return model
    if model.experts is None:
        raise ConvertError(f"pretrained.decoder.{min(training)} is set, and {path} has no experts; leave it out")
    return dataclasses.replace(model, experts=dataclasses.replace(model.experts, **training))


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


def template(path: str, end_token: str | None = None, date: str | None = None) -> ChatTemplate | Template:
    """The chat template at `path` as the template of a training; of a run its own.

    `end_token`: what ends an answer; None: the first special token that the template puts behind one. `date`: what the
    template writes as today; None: the day on which the run starts. Raises ConvertError if there is no template."""
    source = open_source(path)
    if isinstance(source, Workdir):
        return source.run.data.template
    names = [name for name, model in source.models.items() if isinstance(model, Decoder)]
    if len(names) != 1:
        raise ConvertError(f"pretrained.template.path={path!r} holds {len(names)} decoders; name a source with one")
    extras = source.extras[names[0]]
    kind = registry.WHOLE_OF_KIND.get((extras.config or {}).get("model_type", ""))
    text = prompts.template(extras.files, kind.chat_template if kind else None, whole=kind is not None)
    if text is None:
        raise ConvertError(f"pretrained.template.path={path!r} has no chat template; set a settings.Template() instead")
    tokenizer = prompts.tokenizer(extras.files, source.path)
    token = None if kind is None else item_token(extras, kind.item)
    shown = None if token is None else tokenizer.id_to_token(token)
    parts = {} if kind is None or shown is None else {kind.item: shown}
    found = ChatTemplate(text, end_token or "", prompts.specials(extras.files), parts, kind is not None, date)
    found = dataclasses.replace(found, end_token=_end_token(found, tokenizer, path))
    _check_alone(found, tokenizer, extras.files[prompts.TOKENIZER])
    return found


def _end_token(template: ChatTemplate, tokenizer: Tokenizer, path: str) -> str:
    """What ends an answer: as it is set, else the first token that the template puts behind one."""
    try:
        behind = writing.ChatWriter(template, Script(tokenizer, list(template.parts.values()))).closing()
    except SampleError as error:
        raise ConvertError(f"pretrained.template.path={path!r}: {error}; set a settings.Template() instead") from error
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    found = sorted((behind.index(text), -len(text), text) for text in added if text in behind)
    told = f"pretrained.template.path={path!r} puts {behind!r} behind an answer, which"
    if template.end_token:
        if template.end_token in behind:
            return template.end_token
        instead = f"leave it out, which takes {found[0][2]!r}" if found else PLAIN
        raise ConvertError(f"{told} lacks pretrained.template.end_token={template.end_token!r}; {instead}")
    if not found:
        raise ConvertError(f"{told} holds no token that could end it; {PLAIN}")
    return found[0][2]


def _check_alone(template: ChatTemplate, tokenizer: Tokenizer, path: Path) -> None:
    """Raises ConvertError if a training, which reads tokenizer.json alone, would lack a token that files beside it add:
    one that the template may write, or that any text may hold."""
    known = {token.content for token in open_tokenizer(path).get_added_tokens_decoder().values()}
    texts = [template.text, template.end_token, *template.parts.values()]
    texts += [text for name, text in template.names.items() if name in template.text]
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content in known or (token.special and not any(token.content in text for text in texts)):
            continue
        raise ConvertError(
            f"{path} lacks {token.content!r}, which files beside it add, and a training reads it alone; write it anew "
            f"by transformers.PreTrainedTokenizerFast.from_pretrained(DIR).save_pretrained(DIR), DIR={path.parent}"
        )


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
