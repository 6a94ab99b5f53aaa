"""What a run decides once for each of its phases and keeps in its workdir, as JSON, so that a run that resumes has the
same."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Told = TypeVar("Told")


def read(path: Path, checked: Callable[[Any], Told], otherwise: str) -> dict[str, Told]:
    """What `checked` makes of the entries, by phase; none where there is no such file.

    Raises ValueError for a file that no run wrote. `otherwise`: what the run does without it."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {phase: checked(entry) for phase, entry in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} is not what a run writes ({reason}); remove it, and the run {otherwise} anew"
        ) from error


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Entries by phase; the file has all of them, or stays as it was."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    os.replace(new, path)
