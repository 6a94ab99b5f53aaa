"""Several processes as one run: each joins before it uses jax, and then sees the devices of all.

Who it is, a process is told by `hetjax launch` (in the environment), or jax finds it out on a cluster whose manager it
knows (Slurm, Open MPI, Kubernetes' indexed jobs), if `HETJAX_CLUSTER=auto` asks for that.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the one way to its barriers and keys

from hetjax.run import command, programs

COORDINATOR, PROCESSES, PROCESS = "HETJAX_COORDINATOR", "HETJAX_NUM_PROCESSES", "HETJAX_PROCESS"
DEVICES, CLUSTER = "HETJAX_DEVICES_PER_PROCESS", "HETJAX_CLUSTER"
FOR_EVER = 10**9  # ms: what waits for another process ends by the watchdog, not by a timeout of its own
HEARTBEAT = 100.0  # seconds without a sign of life behind which jax ends a run, unless a step may take longer
SOON = 4  # steps: no process is so far ahead of another
POLL = 0.005  # seconds between two looks for what another process is to say
DIFFERS = "hetjax/differs/"  # the directory of what differs between processes
ENDED = "hetjax/ended/"  # the directory of why processes end before the others do
STOP = "hetjax/stop/"  # the directory of the key with the step before which all of them end
_TIMES = itertools.count()
T = TypeVar("T")


def is_told() -> bool:
    """Whether the environment tells this process of others."""
    return any(map(os.environ.get, (COORDINATOR, PROCESSES, PROCESS))) or os.environ.get(CLUSTER) == "auto"


def join_as_told(step_limit: float = HEARTBEAT) -> None:
    """Joins the run that the environment tells of, if it does; only the first process writes to standard output.

    A process that is stopped for less than `step_limit` seconds is not taken for dead."""
    if distributed.global_state.client is not None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, for which a run has its own way
    told = {name: os.environ.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)}
    if all(told.values()):
        numbers = (_number(name) for name in (PROCESSES, PROCESS, DEVICES))
        join(str(told[COORDINATOR]), *numbers, step_limit=step_limit)
    elif any(told.values()):
        missing = ", ".join(name for name, value in told.items() if not value)
        raise ValueError(f"of {', '.join(told)} the environment lacks {missing}; set all, or none")
    elif os.environ.get(CLUSTER) == "auto":
        programs.compile_alone()
        jax.distributed.initialize(heartbeat_timeout_seconds=_heartbeat(step_limit))
    if is_one_of_several():
        programs.write_all()
    if not is_primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the end


def _number(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdigit():
        raise ValueError(f"{name}={value!r}; it must be a whole number")
    return int(value)


def _heartbeat(step_limit: float) -> int:
    return math.ceil(max(HEARTBEAT, 1.2 * step_limit))  # behind the watchdog, which has more to say


def join(coordinator: str, num_processes: int, process: int, emulated: int, *, step_limit: float = HEARTBEAT) -> None:
    """Makes this process number `process` of a run whose first one listens at `coordinator` ("host:port"), with
    `emulated` CPU devices of its own, or where that is 0 with its accelerators. Call it before jax is used."""
    if emulated:
        port = int(coordinator.rpartition(":")[2])
        command.ask_for_emulated(emulated, processes=num_processes)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cross_host_transfer_socket_address", f"127.0.0.1:{port + 1 + process}")
    else:
        programs.compile_alone()
    jax.distributed.initialize(coordinator, num_processes, process, heartbeat_timeout_seconds=_heartbeat(step_limit))


def is_primary() -> bool:
    """Whether this is the process that writes what is written once."""
    return distributed.global_state.process_id == 0


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return distributed.global_state.client is not None


def who() -> str:
    """ "process 1: ", which of several an error is of; "" of one alone."""
    return f"process {distributed.global_state.process_id}: " if is_one_of_several() else ""


def of_others() -> str:
    """ "-process-1", which tells a file of this process from that of the first one; "" in that."""
    return "" if is_primary() else f"-process-{distributed.global_state.process_id}"


def meet(name: str) -> None:
    """Waits until all processes are here, as after compiling: the first collective between processes waits half a
    minute for the last one (Gloo in jax 0.10.2 and 0.12). A name is met once.

    Raises ValueError if another one ends instead."""
    if is_one_of_several():
        where = f"hetjax/met/{name}/"
        state = distributed.global_state
        _client().key_value_set(f"{where}{state.process_id}", "")
        _until(lambda: len(_client().key_value_dir_get(where)) == state.num_processes or None)


def agree(made: Callable[[], Mapping[str, str]]) -> None:
    """Raises ValueError in every process, where one of them has other values than the first: with its number, the
    value's name, and the first line that differs in both; or where one ends instead. The values are made where there
    are several processes alone."""
    if not is_one_of_several():
        return
    values = made()
    for name, value in values.items():
        where = f"hetjax/first/{name}/"
        if is_primary():
            _client().key_value_set(f"{where}0", value)
        elif difference := _difference(value, _until(functools.partial(_said, where))):
            said = f"process {distributed.global_state.process_id} has another {name} than process 0: {difference}"
            _client().key_value_set(f"{DIFFERS}{distributed.global_state.process_id}/{name}", said)
    meet(f"agreed on {', '.join(values)}")
    if differs := _said(DIFFERS):
        raise ValueError(f"{differs}; start all with the same files, settings and versions")


def _until(found: Callable[[], T | None]) -> T:
    """What is `found`, once it is. Raises ValueError if another process ends instead."""
    while (value := found()) is None:
        if ended := _client().key_value_dir_get(ENDED):
            key, why = ended[0]
            raise ValueError(f"process {key.rpartition('/')[2]} ended: {why}")
        time.sleep(POLL)
    return value


def _difference(value: str, first: str) -> str:
    """ "" where there is none."""
    lines = itertools.zip_longest(value.splitlines(), first.splitlines(), fillvalue="nothing")
    return next((f"{mine!r} where that has {theirs!r}" for mine, theirs in lines if mine != theirs), "")


def tell_all(said: str) -> list[str]:
    """What each process says, in their order. All must call it alike, from one thread."""
    if not is_one_of_several():
        return [said]
    where = f"hetjax/said/{next(_TIMES) % 2}/"  # by turns: a slow one may still read what was said the time before
    _client().key_value_set(f"{where}{jax.process_index()}", said, allow_overwrite=True)
    _client().wait_at_barrier("hetjax/said", FOR_EVER)  # in every step: no looks, whose time adds up
    found = {int(key.rpartition("/")[2]): value for key, value in _client().key_value_dir_get(where)}
    return [found[process] for process in sorted(found)]


def ends(step: int, *, signalled: bool) -> bool:
    """Whether the run ends before the step that follows `step`: none of several processes may step alone, so one that
    was `signalled` names a step to all; the first word counts."""
    if not is_one_of_several():
        return signalled
    told = _said(STOP)
    if signalled and told is None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has named one meanwhile
            _client().key_value_set(f"{STOP}step", str(step + SOON))
        told = _said(STOP)
    return told is not None and step >= int(told)


def _said(where: str) -> str | None:
    """The first value of a directory, if it has one."""
    found = _client().key_value_dir_get(where)
    return found[0][1] if found else None


def leave() -> None:
    """Waits for all processes: the first one's end would take the others with it, as that of a run that died."""
    if is_one_of_several():
        jax.distributed.shutdown()


def end(status: int, why: str = "it says why") -> int:
    """`status`, for a process that is alone; one of several ends here, at once, and tells `why` those that wait for it:
    at Python's own end jax would wait for the others, which wait for this one."""
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 2:  # nothing else is wrong, so that the others can still be told
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().key_value_set(f"{ENDED}{distributed.global_state.process_id}", why)
        if status and is_primary():
            time.sleep(1)  # its end takes the others with it, who may be about to say theirs
        os._exit(status)
    return status


def end_by_error() -> None:
    """Inside of an `except`: of several processes this one says what came through, and ends; one that is alone leaves
    both to Python."""
    if is_one_of_several():
        print(f"error: {who()}ends by what follows\n{traceback.format_exc()}", file=sys.stderr)
    end(1)


def _client() -> Any:
    return distributed.global_state.client
