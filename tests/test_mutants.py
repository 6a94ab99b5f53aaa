"""Each patch in tests/mutants is a bug that runs without complaint and trains wrongly: `hetjax.verify` must say so.

A patch's first line tells what it breaks, its directory under which settings (mutants/disjoint.gin, colocated.gin,
and so on). To renew one that no longer applies, make the change again and keep the first line:
`git diff -U1 >> FILE`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import corpus
import pytest
import runs
from corpus import Spec

from hetjax.data import ItemSpec, Pictures

MUTANTS = runs.ROOT / "tests" / "mutants"
PATCHES = {f"{path.parent.name}/{path.stem}": path for path in sorted(MUTANTS.glob("*/*.patch"))}
QUICK = {"disjoint", "colocated"}
LAYOUTS = (
    *("disjoint", "colocated", "experts", "routers", "sequence", "spread", "context", "zero"),
    *("offload", "entries", "attended", "balance", "seeing", "interleaved", "replicas", "split"),
)
# Each takes seconds, all of them minutes.
DEFAULT = {"disjoint/boundary_gradient_scaled", "disjoint/reduce_without_cp", "colocated/tied_gradient_lost"}
ITEM = ItemSpec("vision", 4, Pictures(height=8, width=8), slots_per_group=2)
SAMPLES = (  # rows of different lengths, with different numbers of targets and of pictures
    Spec({"vision": (1,)}),
    Spec({"vision": (1, 1)}, turns=2, words=2),
    Spec({}, turns=3, words=3),
    Spec({"vision": (1, 0, 0)}, turns=3),
    Spec({"vision": (0,)}, words=4),
    Spec({"vision": (0, 1)}, turns=2, words=1),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the data set."""
    return corpus.write(tmp_path_factory.mktemp("data"), SAMPLES * 2, [ITEM])


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A directory with a copy of all that a run imports from here."""
    for package in ("hetjax", "models"):
        shutil.copytree(runs.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def apply(patch: Path, code: Path) -> None:
    """Changes the copy. Fails if the patch does not fit, or changes nothing."""
    # Inside of another repository git would take the paths as relative to that one, and skip them in silence.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(code.parent)}
    line = ["git", "apply", "--verbose", str(patch)]
    applied = subprocess.run(line, cwd=code, env=environment, capture_output=True, text=True)
    assert applied.returncode == 0, f"{patch.name} no longer applies, make it again (see above):\n{applied.stderr}"
    changed = [line[6:].strip() for line in patch.read_text().splitlines() if line.startswith("+++ b/")]
    assert changed, f"{patch.name} names no file"
    for name in changed:
        assert (code / name).read_bytes() != (runs.ROOT / name).read_bytes(), f"{patch.name} left {name} as it was"


def verify(code: Path, layouts: str, data: str) -> subprocess.CompletedProcess:
    """What `python -m hetjax.verify` with the copied code says and returns."""
    files = [f"--gin_file={MUTANTS / name}.gin" for name in ("tiny", layouts)]
    line = [sys.executable, "-m", "hetjax.verify", *files, f"--gin.settings.DataConfig.path={data!r}"]
    environment = {**runs.environment(), "PYTHONPATH": str(code)}
    return subprocess.run(
        [*line, "--dtype=float64", "--steps=2"], cwd=code, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", PATCHES)
def test_patches_apply_and_tell_what_they_break(name: str, code: Path) -> None:
    first = PATCHES[name].read_text().splitlines()[0]
    assert first.endswith(".") and name.split("/")[0] in LAYOUTS
    apply(PATCHES[name], code)


@pytest.mark.parametrize("layouts", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_verify_accepts_the_code_as_it_is(layouts: str, code: Path, data: str) -> None:
    ran = verify(code, layouts, data)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert ran.stdout.count(": within tolerance") == 2


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in PATCHES])
def test_verify_finds_the_mutant(name: str, code: Path, data: str) -> None:
    apply(PATCHES[name], code)
    ran = verify(code, name.split("/")[0], data)
    said = f"{PATCHES[name].read_text().splitlines()[0]}\n{ran.stdout}\n{ran.stderr}"
    assert "Traceback" not in ran.stderr, f"it must run, and train wrongly: {said}"
    assert ran.returncode == 1, said
    assert "FAILED: " in ran.stdout and "BEYOND tolerance" in ran.stdout, said


def test_the_mutants_that_always_run_are_there() -> None:
    assert PATCHES.keys() >= DEFAULT
