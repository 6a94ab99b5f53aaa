"""What a run was asked for, as files in its workdir: written once the run is accepted, and kept when others follow."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


def make(workdir: Path) -> None:
    """Makes the directory. Raises ValueError if it cannot be made."""
    with _explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


def write(workdir: Path, files: Mapping[str, str], resumed: int | None) -> None:
    """Writes `files` by name. Raises ValueError if `workdir` cannot be written.

    Of a run that resumes at step `resumed` with other files, those of before stay as NAME_until_step_N: what was first
    asked for up to there. A run without a checkpoint starts over, and so does its record.
    """
    with _explained(workdir):
        for name, text in files.items():
            path, new = workdir / name, workdir / f"{name}.new"
            new.write_text(text)
            kept = path.with_stem(f"{path.stem}_until_step_{resumed}")
            if resumed is not None and path.exists() and path.read_text() != text and not kept.exists():
                os.replace(path, kept)
            os.replace(new, path)


@contextlib.contextmanager
def _explained(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--workdir={workdir}: {error.strerror}; name a directory that can be written") from error
