"""Checks of the fields of a config.json, each of which is honoured or refused by name."""

import re
from collections.abc import Mapping
from typing import Any

from hetjax.hf.errors import ConvertError

Config = Mapping[str, Any]
VERSION = "transformers_version"


def present(config: Config) -> dict[str, Any]:
    """The fields that say something: null mostly stands for the default, as absence does."""
    return {name: value for name, value in config.items() if value is not None}


def refused(where: str, field: str, value: object, why: str) -> ConvertError:
    """The error for one field."""
    return ConvertError(f"{where}: {field}={value!r}: {why}")


def only(config: Config, allowed: Config, where: str) -> None:
    """Raises ConvertError for a field of `allowed` that has another value than there; None stands for absent."""
    for name, value in allowed.items():
        if config.get(name, value) not in (value, None):
            why = f"only {value!r} is computed; a model with another value is not supported"
            raise refused(where, name, config[name], why)


def nonzero(config: Config, *names: str) -> dict[str, Any]:
    """Those of the fields that would have an effect."""
    return {name: config[name] for name in names if config.get(name)}


def is_of_4(config: Config) -> bool:
    """Whether transformers 4.x wrote the config: where two fields tell one fact, its writer's precedence holds, and
    that of version 5 where nothing tells of one."""
    return re.match(r"[1-4]\.", str(config.get(VERSION))) is not None
