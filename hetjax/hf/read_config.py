"""From a Hugging Face config.json to our models. Every field that changes what the model computes is honoured or
refused by name; the others (initial values, token ids, length limits) are kept for the export.

A field that is absent has the default of its family: files leave out what equals it.
"""

from collections.abc import Mapping
from typing import Any

from hetjax.hf.errors import ConvertError
from hetjax.hf.families import registry
from hetjax.hf.families.family import Whole
from hetjax.hf.fields import Config, refused
from hetjax.hf.parts import Parts


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
    found = registry.inner(config)
    whole = registry.WHOLE_OF_KIND.get(config["model_type"])
    if whole is None:
        ((part, inner),) = found.items()
        return Parts(**{part: registry.OF_KIND[inner["model_type"]].read(inner, where)})
    _check_inner(whole, found, where)
    read = lambda part, **changes: registry.OF_KIND[found[part]["model_type"]].read(
        found[part], f"{where}: {whole.fields[part]}", **changes
    )
    choices = whole.choices(config, where)
    llm = read("llm")
    return Parts(**{"llm": llm, whole.encoder: read(whole.encoder, output_width=llm.width, **choices)})


def _check_inner(whole: Whole, found: Mapping[str, dict[str, Any]], where: str) -> None:
    """Raises ConvertError unless each config inside is of a kind that fits, in plain numbers."""
    decoders = [family.kind for family in registry.FAMILIES if family.part == "llm"]
    for part, config in found.items():
        field, kinds = whole.fields[part], decoders if part == "llm" else whole.kinds
        if config["model_type"] not in kinds:
            kind, why = config["model_type"], f"not supported; these are: {', '.join(kinds)}"
            raise refused(where, f"{field}.model_type", kind, registry.REFUSED.get(str(kind), why))
        if config.get("quantization_config"):
            raise refused(where, f"{field}.quantization_config", "...", "quantised weights are not read")


def unapplied(config: Config, part: str) -> str:
    """The fields of config.json, with their values, that transformers applies to a module in training, and we do not:
    they change no parameter and no evaluation. Empty if there are none. `config` is one that was read."""
    whole, inner = registry.WHOLE_OF_KIND.get(config["model_type"]), registry.inner(config)[part]
    before = "" if whole is None else f"{whole.fields[part]}."
    found = registry.OF_KIND[inner["model_type"]].unapplied(inner)
    return ", ".join(f"{before}{name}={value!r}" for name, value in found.items())
