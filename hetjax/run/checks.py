"""Checks that several settings of a run share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{setting}={value!r}; it must be one of {', '.join(choices)}")


def check_model(module: str, model: Any, fields: tuple[str, ...], kind: str) -> None:
    """Raises ValueError unless `model` has one of the fields that tell its kind."""
    if not any(hasattr(model, field) for field in fields):
        raise ValueError(f"{module}.model is a {type(model).__name__}; it must be {kind}")


def check_at_least(setting: str, value: int, low: int) -> None:
    """Raises ValueError for less than `low`."""
    if value < low:
        raise ValueError(f"{setting}={value}; it must be at least {low}")


def check_steps(setting: str, steps: Sequence[int], last: int) -> None:
    """Raises ValueError for a step that a run up to `last` does not have."""
    for step in steps:
        if not 1 <= step <= last:
            raise ValueError(f"{setting} names {step}; the run has steps 1 to {last}")


def check_ending(flag: str, name: str, endings: Sequence[str]) -> None:
    """Raises ValueError for the name of a file that ends in none of them."""
    if Path(name).suffix not in endings:
        raise ValueError(f"{flag}={name}; its name must end in {' or '.join(endings)}")
