"""Each of several processes compiles programs of its own, and nobody else's findings are waited for."""

import os

import jax
import pytest
from jax._src import compiler, distributed

from hetjax.run import cluster, programs
from hetjax.run.programs import TOGETHER


def test_real_devices_of_several_processes_try_kernels_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **settings: None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    cluster.join("127.0.0.1:1", 2, 1, 0)
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_autotune_level=2 {TOGETHER}=false"
    monkeypatch.setenv("XLA_FLAGS", f"{TOGETHER}=true")
    cluster.join("127.0.0.1:1", 2, 1, 0)
    assert os.environ["XLA_FLAGS"] == f"{TOGETHER}=true"
    monkeypatch.delenv("XLA_FLAGS")
    for name, value in {cluster.CLUSTER: "auto", cluster.COORDINATOR: "", cluster.PROCESS: ""}.items():
        monkeypatch.setenv(name, value)
    cluster.join_as_told()
    assert os.environ["XLA_FLAGS"] == f"{TOGETHER}=false"


def test_a_process_that_is_not_the_first_writes_what_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put = lambda key, *rest: written.append(key)
    monkeypatch.setattr(compiler.compilation_cache, "put_executable_and_time", put)
    monkeypatch.setattr(distributed.global_state, "process_id", 1)
    monkeypatch.setattr(compiler, "_cache_write", compiler._cache_write)  # put back behind the test
    arguments = {"cache_key": "key", "compile_time_secs": 1e6, "module_name": "a", "backend": None, "executable": None}
    taken = compiler._cache_write.__code__.co_varnames[: compiler._cache_write.__code__.co_argcount]
    arguments = [arguments.get(name) for name in taken]
    compiler._cache_write(*arguments)
    assert written == []
    programs.write_all()
    compiler._cache_write(*arguments)
    assert written == ["key"] and distributed.global_state.process_id == 1
