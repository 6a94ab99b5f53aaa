"""`hetjax`: it lists its commands at once, runs each as its module, and names the nearest of what it does not know."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hetjax
from hetjax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
HEAVY = {"jax", "numpy", "gin", "rich", "hetjax.run"}
SCRIPT = """
import sys
from {} import {} as main
code = main()
print(sorted(sys.modules), file=sys.stderr)
sys.exit(code)
"""


def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What the script that [project.scripts] installs does; at its end it tells the modules that it has imported."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["hetjax"]
    line = [sys.executable, "-P", "-c", SCRIPT.format(*entry.split(":")), *arguments]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=cwd, env=paths, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_alone_it_lists_every_command_and_imports_nothing_heavy(arguments: list[str]) -> None:
    ran = call(*arguments)
    lines = [line.strip() for line in ran.stdout.splitlines()[2:]]
    assert ran.returncode == 0 and [re.split("  +", line)[0] for line in lines] == [f"hetjax {c}" for c in COMMANDS]
    assert all(len(line) < 80 for line in ran.stdout.splitlines()[1:])
    assert not HEAVY & set(re.findall(r"'([\w.]+)'", ran.stderr))


def test_the_module_is_the_same_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "hetjax"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == call().stdout


def test_the_version_is_told_in_one_place() -> None:
    assert call("--version").stdout == f"hetjax {hetjax.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "hetjax/__init__.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "error: no command trian; did you mean train?"),
        ("inspect", "error: no command inspect; did you mean data inspect?"),
        ("--gin_file=a", f"error: no command --gin_file=a; there is {', '.join(sorted(COMMANDS))}"),
    ],
)
def test_an_unknown_command_ends_with_status_2_and_the_nearest(name: str, message: str) -> None:
    ran = call(name)
    assert ran.returncode == 2 and ran.stderr.splitlines()[0] == message and not ran.stdout


@pytest.mark.parametrize("name", [command.split()[0] for command in COMMANDS])
def test_help_of_a_command_has_an_example_and_says_what_each_flag_is(name: str) -> None:
    module = {"data": "hetjax.inspect", "generate": "hetjax.generate.__main__"}.get(name, f"hetjax.{name}")
    about = (importlib.import_module(module).__doc__ or "").strip()
    ran = call(name, "--help")
    assert ran.returncode == 0 and ran.stdout.startswith(f"usage: hetjax {name} ")
    assert about in ran.stdout and f"\n    hetjax {name} " in about
    options = ran.stdout.split("options:")[1]
    assert "--gin.NAME=VALUE" in options or "gin_file" not in options
    for flag, line, below in re.findall(r"^  (--?\w+)(.*)\n(.*)", options, re.MULTILINE):
        assert re.search(r"  \w", line) or re.match(r" {10,}\w", below), f"{flag} has no help"


def test_what_lacks_a_gin_file_says_how_to_name_one() -> None:
    ran = call("train")
    assert ran.returncode == 2 and ran.stderr.splitlines()[-1].endswith(
        "required: --gin_file, --workdir; for example --gin_file=configs/quickstart.gin --workdir=runs/quickstart"
    )


def test_a_command_reads_gin_files_that_import_modules_from_where_it_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def encoder() -> None: ...\n")
    (tmp_path / "run.gin").write_text("import mine\nmine.encoder.width = 3\n")
    ran = call("train", "--gin_file=run.gin", "--workdir=run", cwd=tmp_path)
    assert ran.returncode == 2 and "run.gin:2: mine.encoder has no field width" in ran.stderr
