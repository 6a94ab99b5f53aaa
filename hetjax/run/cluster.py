"""Several processes as one run: each joins before it uses jax, and then sees the devices of all."""

import os

import jax
from jax._src import distributed  # the one way to its barrier


def join(coordinator: str, num_processes: int, process: int, emulated: int) -> None:
    """Makes this process number `process` of a run whose first one listens at `coordinator` ("host:port"), with
    `emulated` CPU devices of its own. Call it before jax is used."""
    os.environ.setdefault("PJRT_NPROC", str(max(64, 8 * emulated)))
    port = coordinator.rpartition(":")[2]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", emulated)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cross_host_transfer_socket_address", f"127.0.0.1:{int(port) + 1 + process}")
    jax.distributed.initialize(coordinator, num_processes, process)


def meet(name: str, seconds: float) -> None:
    """Waits until all processes are here, as after compiling: the first collective between processes waits half a
    minute for the last one (Gloo in jax 0.10.2 and 0.12). Raises jax.errors.JaxRuntimeError behind `seconds`."""
    if distributed.global_state.client is not None:
        distributed.global_state.client.wait_at_barrier(name, int(1000 * seconds))


def leave() -> None:
    """Waits for all processes: the first one's end would take the others with it, as that of a run that died."""
    jax.distributed.shutdown()
