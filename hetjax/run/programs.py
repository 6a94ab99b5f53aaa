"""How the processes of a run compile: each the programs of its own stages, which jax and XLA do not expect."""

import os
import types

from jax._src import compiler  # no setting says who writes compiled programs

TOGETHER = "--xla_gpu_shard_autotuning"


def compile_alone() -> None:
    """XLA would have every process of a run try a share of each program's kernels on its GPU, and wait for the others'
    findings (by default in jax 0.10 to 0.12): for ever, where these compile other programs. Call it before jax is used.
    What XLA_FLAGS says of it already stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if TOGETHER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {TOGETHER}=false".strip()


def write_all() -> None:
    """jax writes to its persistent cache what the first process compiles alone, as if the others compiled the same:
    those would compile theirs again at every start. From here on this one writes its own."""
    plain = compiler._cache_write
    first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    compiler._cache_write = types.FunctionType(plain.__code__, {**plain.__globals__, "distributed": first})
