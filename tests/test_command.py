"""The command line, emulated devices and the compilation cache."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from hetjax.run import command
from hetjax.run.ginfile import ConfigError

ROOT = Path(__file__).parent.parent


def test_arguments_are_files_settings_a_directory_and_own_flags() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    got = command.parse_arguments(
        [
            "--gin_file=a.gin",
            "--gin.x.Y.z='a=b'",
            "--workdir",
            "runs/a",
            "--gin_file",
            "b.gin",
            "--rounds=3",
            "--gin.N=4",
        ],
        parser,
    )
    assert got.gin_files == ("a.gin", "b.gin") and got.workdir == "runs/a" and got.flags.rounds == 3
    assert got.bindings == ("x.Y.z = 'a=b'", "N = 4")
    assert command.parse_arguments(["--gin_file=a.gin"], argparse.ArgumentParser(), needs_workdir=False).workdir == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gin_file=a", "--workdir=w", "--wrkdir=x"], r"unknown argument --wrkdir=x; did you mean --workdir\?"),
        (["--gin_file=a", "--workdir=w", "--gin.x.y", "3"], "--gin.x.y has no value: write --gin.x.y=VALUE"),
        (["--workdir=w"], "required: --gin_file"),
        (["--gin_file=a"], "required: --workdir"),
        (["--gin_f=a", "--workdir=w"], r"unknown argument --gin_f=a; did you mean --gin_file\?"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command.parse_arguments(argv, command.new_parser("train", ""))
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_emulated_devices_come_with_threads_for_their_collectives() -> None:
    """Programs with collectives that run far ahead on overlapping meshes end; in pools of 8 threads jax aborts."""
    code = """
from hetjax.run import command
command.emulate_devices(8)
import jax, numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
where = PartitionSpec("dp", "tp")
def summed(x):
    return jax.lax.psum(x @ x.T, "tp")[:, :4] + jax.lax.all_gather(x, "dp", tiled=True).sum()
def made(first, shape):
    mesh = Mesh(numpy.array(jax.devices()[first : first + shape[0] * shape[1]]).reshape(shape), ("dp", "tp"))
    x = jax.device_put(numpy.ones((4 * shape[0], 4 * shape[1])), NamedSharding(mesh, where))
    return jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=where, out_specs=where)), x
jobs = [made(0, (2, 4)), made(0, (4, 2)), made(2, (2, 2)), made(4, (2, 2))]
jax.block_until_ready([program(x) for _ in range(500) for program, x in jobs])
print(len(jax.devices()))
"""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PJRT_"))}
    ran = subprocess.run([sys.executable, "-c", code], env=inherited, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "8", ran.stderr[-1000:]


def test_emulated_devices_after_the_start_of_jax_need_enough_of_them() -> None:
    have = len(jax.devices())
    command.emulate_devices(have - 1)
    assert len(jax.devices()) == have
    with pytest.raises(ConfigError, match=r"99 emulated CPU devices asked for, but jax already runs on \d+ cpu device"):
        command.emulate_devices(99)


@pytest.fixture
def no_cache() -> Iterator[None]:
    """jax as it is without a compilation cache, and as it was before when the test ends."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("no_cache")
def test_the_compilation_cache_is_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/xdg")
    command.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "/tmp/xdg/hetjax"
    jax.config.update("jax_compilation_cache_dir", None)
    command.use_compilation_cache("/tmp/own")
    assert jax.config.jax_compilation_cache_dir == "/tmp/own"
    jax.config.update("jax_compilation_cache_dir", None)
    command.use_compilation_cache("~/own")
    assert jax.config.jax_compilation_cache_dir == os.path.expanduser("~/own") != "~/own"
    command.use_compilation_cache("/tmp/other")  # jax has one already
    assert jax.config.jax_compilation_cache_dir != "/tmp/other" and jax.config.jax_enable_compilation_cache
    command.use_compilation_cache("")
    assert not jax.config.jax_enable_compilation_cache
