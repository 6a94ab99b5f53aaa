"""From a Hugging Face config.json to our models. Every field that changes what the model computes is honoured or
refused by name; the others (initial values, token ids, length limits) are kept for the export.

A field that is absent has the default of its family: files leave out what equals it.
"""

from collections.abc import Mapping
from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.fields import Config, refused
from hetjax.hf.parts import Parts

PER_LAYER = "per_layer_config"  # settings of single layers, in any config of transformers 5


def read(config: Config, where: str) -> Parts:
    """The models of config.json, which `where` names in messages. Raises ConvertError."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in registry.KINDS:
        why = f"this architecture is not supported; supported are {', '.join(registry.KINDS)}"
        raise refused(where, "model_type", kind, registry.REFUSED.get(str(kind), why))
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            method = config[name].get("quant_method", "?") if isinstance(config[name], Mapping) else config[name]
            raise refused(
                where, name, method, "quantised weights are not read; take the original model, or dequantise it"
            )
    try:
        return _parts(config, where)
    except ConvertError:
        raise
    except ValueError as error:  # sizes that contradict each other
        raise ConvertError(f"{where}: {error}") from error
    except KeyError as error:
        raise ConvertError(f"{where}: {error} is missing; get the file again") from error
    except (TypeError, AttributeError) as error:
        raise ConvertError(f"{where}: a field has another type than it must ({error}); get the file again") from error


def _parts(config: Config, where: str) -> Parts:
    found, fields = registry.inner(config), registry.fields(config)
    _check_inner(config, where)

    def read(part: str, **changes: Any) -> Any:
        place = f"{where}: {fields[part]}" if fields[part] else where
        return registry.OF_KIND[found[part]["model_type"]].read(found[part], place, **changes)

    whole = registry.WHOLE_OF_KIND.get(config["model_type"])
    if whole is None:
        return Parts(**{part: read(part) for part in found})
    choices = whole.choices(config, where)
    llm = read("llm")
    return Parts(**{"llm": llm, whole.encoder: read(whole.encoder, output_width=llm.width, **choices)})


def _check_inner(config: Config, where: str) -> None:
    """Raises ConvertError unless each config inside is of a kind that fits, in plain numbers."""
    for part, inner in registry.inner(config).items():
        field, kind = registry.fields(config)[part], inner["model_type"]
        kinds = registry.kinds_inside(config, part)
        if field and kind not in kinds:
            why = f"not supported; these are: {', '.join(kinds)}"
            raise refused(where, f"{field}.model_type", kind, registry.REFUSED.get(str(kind), why))
        if field and inner.get("quantization_config"):
            raise refused(where, f"{field}.quantization_config", "...", "quantised weights are not read")
        if inner.get(PER_LAYER):
            why = "layers that differ in their settings are not supported"
            raise refused(f"{where}: {field}" if field else where, PER_LAYER, inner[PER_LAYER], why)


def unapplied(config: Config, part: str) -> str:
    """The fields of config.json, with their values, that transformers applies to a module in training, and we do not:
    they change no parameter and no evaluation. Empty if there are none. `config` is one that was read."""
    inner, field = registry.inner(config)[part], registry.fields(config)[part]
    found = registry.OF_KIND[inner["model_type"]].unapplied(inner)
    return ", ".join(f"{field}{'.' * bool(field)}{name}={value!r}" for name, value in found.items())
