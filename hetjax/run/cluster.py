"""Several processes as one run: each joins before it uses jax, and then sees the devices of all."""

import os

import jax


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
