"""Files of JSON lines from which a script that was ended goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All that the file has; a line that was being written when the script was ended is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def add(path: Path, values: Mapping[str, Any]) -> None:
    """A line more, on disk behind this call."""
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())
