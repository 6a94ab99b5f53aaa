"""Several processes as one run: each joins before it uses jax, and then sees the devices of all.

Who it is, a process is told by `hetjax launch` (in the environment), or jax finds it out on a cluster whose manager it
knows (Slurm, Open MPI, Kubernetes' indexed jobs), if `HETJAX_CLUSTER=auto` asks for that.
"""

import contextlib
import itertools
import os
import sys
from typing import Any

import jax
from jax._src import distributed  # the one way to its barriers and keys

from hetjax.run import command

COORDINATOR, PROCESSES, PROCESS = "HETJAX_COORDINATOR", "HETJAX_NUM_PROCESSES", "HETJAX_PROCESS"
DEVICES, CLUSTER = "HETJAX_DEVICES_PER_PROCESS", "HETJAX_CLUSTER"
PATIENCE = 3600.0  # seconds that a process waits for one that compiles, or reads its data
LAST_WORDS = 2.0  # seconds
SOON = 4  # steps: no process is so far ahead of another
STOP = "hetjax/stop/"  # the directory of the key with the step before which all of them end
_TIMES = itertools.count()


def join_as_told() -> None:
    """Joins the run that the environment tells of, if it does; only the first process writes to standard output."""
    if distributed.global_state.client is not None:
        return
    told = {name: os.environ.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)}
    if all(told.values()):
        numbers = (_number(name) for name in (PROCESSES, PROCESS, DEVICES))
        join(str(told[COORDINATOR]), *numbers)
    elif any(told.values()):
        missing = ", ".join(name for name, value in told.items() if not value)
        raise ValueError(f"of {', '.join(told)} the environment lacks {missing}; set all, or none")
    elif os.environ.get(CLUSTER) == "auto":
        jax.distributed.initialize()
    if not is_primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the end


def _number(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdigit():
        raise ValueError(f"{name}={value!r}; it must be a whole number")
    return int(value)


def join(coordinator: str, num_processes: int, process: int, emulated: int) -> None:
    """Makes this process number `process` of a run whose first one listens at `coordinator` ("host:port"), with
    `emulated` CPU devices of its own, or where that is 0 with its accelerators. Call it before jax is used."""
    if emulated:
        port = int(coordinator.rpartition(":")[2])
        command.ask_for_emulated(emulated)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cross_host_transfer_socket_address", f"127.0.0.1:{port + 1 + process}")
    jax.distributed.initialize(coordinator, num_processes, process)


def is_primary() -> bool:
    """Whether this is the process that writes what is written once."""
    return distributed.global_state.process_id == 0


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return distributed.global_state.client is not None


def meet(name: str) -> None:
    """Waits until all processes are here, as after compiling: the first collective between processes waits half a
    minute for the last one (Gloo in jax 0.10.2 and 0.12). Raises jax.errors.JaxRuntimeError behind PATIENCE."""
    if is_one_of_several():
        _client().wait_at_barrier(name, int(1000 * PATIENCE))


def agree(name: str, value: str) -> None:
    """Raises ValueError, with both, in every process whose `value` is not that of the first one."""
    if not is_one_of_several():
        return
    if is_primary():
        _client().key_value_set(f"hetjax/{name}", value)
    first = _client().blocking_key_value_get(f"hetjax/{name}", int(1000 * PATIENCE))
    if value != first:
        lines = zip(value.splitlines(), first.splitlines(), strict=False)
        mine, theirs = next(((a, b) for a, b in lines if a != b), (f"{len(value)} characters", f"{len(first)}"))
        raise ValueError(
            f"process {jax.process_index()} has another {name} than process 0: {mine!r} where that has {theirs!r}; "
            "start all with the same files and settings"
        )


def tell_all(said: str) -> list[str]:
    """What each process says, in their order. All must call it alike, from one thread."""
    if not is_one_of_several():
        return [said]
    where = f"hetjax/said/{next(_TIMES) % 2}/"  # by turns: a slow one may still read what was said the time before
    _client().key_value_set(f"{where}{jax.process_index()}", said, allow_overwrite=True)
    meet("hetjax/said")
    found = {int(key.rpartition("/")[2]): value for key, value in _client().key_value_dir_get(where)}
    return [found[process] for process in sorted(found)]


def ends(step: int, *, signalled: bool) -> bool:
    """Whether the run ends before the step that follows `step`: none of several processes may step alone, so one that
    was `signalled` names a step to all; the first word counts."""
    if not is_one_of_several():
        return signalled
    told = _told()
    if signalled and not told:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has named one meanwhile
            _client().key_value_set(f"{STOP}step", str(step + SOON))
        told = _told()
    return bool(told) and step >= int(told)


def _told() -> str:
    found = _client().key_value_dir_get(STOP)
    return found[0][1] if found else ""


def leave() -> None:
    """Waits for all processes: the first one's end would take the others with it, as that of a run that died."""
    if is_one_of_several():
        jax.distributed.shutdown()


def end(status: int) -> int:
    """`status`, for a process that is alone; one of several ends here: at Python's own end jax would wait for the
    others, which wait for this one. Those that end by the same error have LAST_WORDS to say so: with the first process
    their coordinator goes."""
    if is_one_of_several():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().wait_at_barrier("hetjax/end", int(1000 * LAST_WORDS))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _client() -> Any:
    return distributed.global_state.client
