"""Directories and files that are there whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hetjax.data.paths import expanded
from hetjax.hf.errors import ConvertError


@contextlib.contextmanager
def written(out: str | Path) -> Iterator[Path]:
    """A path beside `out` to write a directory or a file to; it becomes `out` at the end, and is removed on an error.

    Raises ConvertError if `out` is there already."""
    target = Path(expanded(out)).absolute()
    if target.exists():
        raise ConvertError(f"--out={out} is there already; name another, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConvertError(f"--out={out}: {error.strerror}; name a place that can be written") from error
    try:
        new = holder / target.name
        yield new
        os.rename(new, target)
    except OSError as error:
        raise ConvertError(f"--out={out} cannot be written: {error}; is the disk full?") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
