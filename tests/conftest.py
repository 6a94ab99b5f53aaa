"""What every test stands on: eight emulated CPU devices, warnings as errors, counters of compilations and fetches."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("PJRT_NPROC", "16")  # two for each device, as `command.ask_for_emulated` has it; children too
os.environ["JAX_PLATFORMS"] = "cpu"
# The programs are tiny, and most of the suite's time is their compilation. A collective that waits for a device which
# never comes ends the process, instead of hanging the suite.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",  # compiles three times faster
        "--xla_llvm_disable_expensive_passes=true",
        # a further third of a test's time, where it is known
        *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."),
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=20",
        "--xla_cpu_collective_call_terminate_timeout_seconds=60",
    ]
)

import jax
import jax.monitoring
import pytest
from jax._src import array as jax_array

NUM_DEVICES = 8
# A second run of the suite compiles little. Each worker keeps its own: jax writes entries in place, not by rename.
CACHE = Path(__file__).parent.parent / ".cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
COMPILED = "/jax/core/compile/backend_compile_duration"
MAPS = Path("/proc/self/maps")  # of memory; Linux gives a process 65,530 of them

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
assert len(jax.devices()) == NUM_DEVICES  # started here: the first test may ask for fewer


class Counter:
    """Counts events from `reset()` (or the start of the test) on."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Behind a file of tests its programs are let go where they have taken many maps of memory: at the limit, which the
    suite meets with jax 0.12, compiling ends the process."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """The test runs in float64, in every thread (`jax.enable_x64` as a context holds for one)."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def compilations() -> Iterator[Counter]:
    """Counts XLA compilations; one served by the persistent cache counts too."""
    counter = Counter()

    def listener(event: str, duration: float, **_: object) -> None:
        counter.count += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield counter
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.fixture
def host_fetches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts arrays whose values were brought to the host, also those that jax fetches in silence to put them."""
    counter = Counter()
    plain = jax_array.ArrayImpl._value.fget

    def counted(array: jax.Array) -> object:
        counter.count += 1
        return plain(array)

    monkeypatch.setattr(jax_array.ArrayImpl, "_value", property(counted))
    return counter


LONGEST = ("processes", "launch", "drawn", "mutants", "parity", "benchmarks", "resume", "phases", "checkpoint", "remat")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a worker that began one last would end alone."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
