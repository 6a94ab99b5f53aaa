"""What every command does first: read its arguments, choose emulated devices, keep compiled programs."""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from hetjax.data.paths import expanded
from hetjax.run.ginfile import nearest
from hetjax.run.values import ConfigError

EXAMPLE = "--gin_file=configs/quickstart.gin --workdir=runs/quickstart"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line. `workdir` is "" for a command without one; `flags` are the command's own."""

    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]  # gin syntax: "experiment.Experiment.steps = 100"
    workdir: str
    flags: argparse.Namespace


def new_parser(name: str, about: str) -> argparse.ArgumentParser:
    """The parser of `hetjax NAME`; `about`, with its examples, is what --help begins with.

    From here on the command prints \\xd7 where the terminal's encoding lacks a character, as under LC_ALL=C, and does
    not end by it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"hetjax {name}", description=about.strip(), formatter_class=raw, allow_abbrev=False
    )


def parse_arguments(argv: Sequence[str], parser: argparse.ArgumentParser, *, needs_workdir: bool = True) -> Arguments:
    """The arguments in `argv` (without the program's name). `parser` brings the command's own flags.

    Adds `--gin_file=FILE` and `--gin.NAME=VALUE`, both repeatable, and `--workdir=DIR` where the command needs one.
    Exits with status 2 on an unknown flag, naming the nearest one, and without a file, saying what one is.
    """
    parser.add_argument(
        "--gin_file", action="append", metavar="FILE", help="what the run is; repeatable, later ones win"
    )
    parser.add_argument("--gin.NAME=VALUE", action="store_true", help="one setting; repeatable, wins over the files")
    if needs_workdir:
        parser.add_argument("--workdir", metavar="DIR", help="where metrics, checkpoints and settings go")
    bindings = [a for a in argv if a.startswith("--gin.")]
    flags, unknown = parser.parse_known_args([a for a in argv if not a.startswith("--gin.")])
    for binding in bindings:
        if "=" not in binding:
            parser.error(f"{binding} has no value: write {binding}=VALUE")
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    missing = [f"--{name}" for name in ("gin_file", "workdir") if getattr(flags, name, "") is None]
    if missing:
        parser.error(f"required: {', '.join(missing)}; for example {EXAMPLE if needs_workdir else EXAMPLE.split()[0]}")
    names = (binding.removeprefix("--gin.").partition("=") for binding in bindings)
    settings = tuple(f"{name} = {value}" for name, _, value in names)
    try:
        gin_files, workdir = tuple(map(expanded, flags.gin_file)), expanded(getattr(flags, "workdir", ""))
    except ValueError as error:
        parser.error(str(error))
    return Arguments(gin_files, settings, workdir, flags)


def emulate_devices(count: int) -> None:
    """Makes this process run on `count` emulated CPU devices. Call it before the first array."""
    with contextlib.suppress(RuntimeError):  # the backend has started, in a notebook or a test: enough will do
        ask_for_emulated(count)
    found = jax.devices()
    if found[0].platform != "cpu" or len(found) < count:
        raise ConfigError(
            f"{count} emulated CPU devices asked for, but jax already runs on {len(found)} {found[0].platform} "
            "device(s): start a fresh process, or set emulated devices before the first use of jax"
        )


def ask_for_emulated(count: int, *, processes: int = 1) -> None:
    """Sets what makes a backend that starts later one of `count` emulated CPU devices, in each of so many processes.
    Raises RuntimeError if it has started.

    Also PJRT_NPROC, the width of the CPU client's thread pools, where it is not set: in pools as narrow as a small
    machine's, programs with collectives starve each other and the client aborts. Wider ones cost time: XLA cuts each
    operation in as many pieces. It goes by the devices of all processes, since the pieces are part of what makes bits.
    """
    os.environ.setdefault("PJRT_NPROC", str(max(2 * count * processes, os.cpu_count() or 1)))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def use_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled programs in `directory`; None is $XDG_CACHE_HOME/hetjax or ~/.cache/hetjax, "" keeps none.

    A directory that jax was already given (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if directory == "":
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", expanded(directory or Path(root) / "hetjax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
