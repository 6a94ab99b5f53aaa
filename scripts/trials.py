"""A small run of several processes on this machine that scripts disturb: started, watched, broken, and compared."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hetjax.launch import die_with_parent, free_ports
from hetjax.run import cluster, metrics
from hetjax.run.checkpoint import steps_in

ROOT = Path(__file__).parent.parent
POLL = 0.002  # seconds between two looks at a run's files: a save of the small model takes 50 ms
QUICK = "--xla_backend_optimization_level=0"


def small(processes: int) -> dict[str, object]:
    """Settings of the quickstart that make it small, with each module on the devices of all processes, one each."""
    return {
        "vit.ViT.width": 16,
        "vit.ViT.mlp_width": 32,
        "vit.ViT.num_layers": 1,
        "vit.ViT.num_heads": 2,
        "vit.ViT.output_width": 16,
        "decoder.Decoder.width": 16,
        "decoder.Decoder.mlp_width": 32,
        "decoder.Decoder.num_layers": 1,
        "decoder.Decoder.num_heads": 2,
        "decoder.Decoder.num_kv_heads": 2,
        "vision/layout.Layout.devices": f"'0-{processes - 1}'",
        "vision/layout.Layout.dp": processes,
        "llm/layout.Layout.devices": f"'0-{processes - 1}'",
        "llm/layout.Layout.dp": processes // 2,
        "vision/experiment.Encoder.slots_per_group": 2,
        "settings.DataConfig.samples_per_group": 2,
        "experiment.Experiment.eval_microbatches": 4,
        "experiment.Experiment.log_every": 1,
    }


@dataclasses.dataclass
class Run:
    """A command that trains in several processes, with what it says in a file."""

    workdir: Path
    settings: Mapping[str, object]
    cache: Path
    processes: int
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    running: list[subprocess.Popen] = dataclasses.field(default_factory=list)
    calls: int = 0

    def launch(self, *, learns: bool = False) -> None:
        """By `hetjax launch`; one that `learns` keeps what it compiles, of which a killed one would leave halves."""
        flags = ["-n", str(self.processes), "--devices-per-process=1"]
        self._start(["-m", "hetjax", "launch", *flags, "--", "train", *self._arguments()], learns=learns)

    def start_each(self, changes: Sequence[Mapping[str, object]] = ()) -> None:
        """One by one, as a cluster does, with nobody who ends all when one dies."""
        told = {cluster.COORDINATOR: f"127.0.0.1:{free_ports(1 + self.processes)}"}
        told |= {cluster.PROCESSES: str(self.processes), cluster.DEVICES: "1"}
        for n in range(self.processes):
            mine = changes[n] if changes else {}
            self._start(["-m", "hetjax.train", *self._arguments(mine)], told | {cluster.PROCESS: str(n)})

    def _arguments(self, changes: Mapping[str, object] | None = None) -> list[str]:
        settings = small(self.processes) | dict(self.settings) | dict(changes or {})
        bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
        return ["--gin_file=configs/quickstart.gin", f"--workdir={self.workdir}", *bindings]

    def _start(self, command: list[str], told: Mapping[str, str] | None = None, *, learns: bool = False) -> None:
        keeps = {"JAX_COMPILATION_CACHE_DIR": str(self.cache), "XLA_FLAGS": QUICK, "PYTHONUNBUFFERED": "1"}
        keeps["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0" if learns else "1e9"
        env = os.environ | keeps | dict(told or {}) | dict(self.environment)
        self.calls += 1
        with (self.workdir.parent / f"{self.workdir.name}.{self.calls}.log").open("w") as log:
            self.running.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=env,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=die_with_parent,
                )
            )

    @property
    def said(self) -> str:
        """What all calls have said so far."""
        logs = sorted(self.workdir.parent.glob(f"{self.workdir.name}.*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in logs)

    @property
    def trainers(self) -> list[int]:
        """The process ids of those that train, in their order."""
        if len(self.running) > 1:
            return [process.pid for process in self.running]
        pid = self.running[0].pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def until(self, true: Callable[[], bool], seconds: float) -> None:
        """Waits for it. Raises RuntimeError if the run ends before, or that takes longer."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end or any(process.poll() is not None for process in self.running):
                raise RuntimeError(f"{self.workdir}: what was waited for did not come; {self.said[-3000:]}")
            time.sleep(POLL)

    def ended(self, seconds: float) -> list[int | None]:
        """The exit statuses, None of those that had to be killed behind so many seconds."""
        end, codes = time.monotonic() + seconds, []
        for process in self.running:
            try:
                codes.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        self.kill()
        return codes

    def kill(self) -> None:
        """Ends what is left of it."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                for pid in self.trainers if len(self.running) == 1 else []:
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
        self.running.clear()

    def step(self) -> int:
        """The newest step in the metrics."""
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        """Step -> loss, as the metrics have them."""
        path = self.workdir / metrics.FILE
        return {r["step"]: r["loss"] for r in metrics.read_jsonl(path) if "loss" in r} if path.is_file() else {}

    def checkpoints(self) -> list[int]:
        """The steps of the complete ones."""
        return sorted(steps_in(self.workdir / "checkpoints"))
