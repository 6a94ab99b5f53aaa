"""The lines of metrics.jsonl: what a step gave, and the rates since the line, the save or the evaluation before."""

import itertools
import math
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hetjax.core import flops
from hetjax.core.finish import Outcome
from hetjax.core.trainer import Trainer
from hetjax.data import Loader
from hetjax.data.items import count
from hetjax.run import metrics
from hetjax.run.experiment import Experiment
from models.contract import ModuleDef

Values = dict[str, Any]


class Log:
    """Writes a line every `log_every` steps: there it waits for the devices, and between them one step late."""

    def __init__(self, run: Experiment, trainer: Trainer, loader: Loader, writer: metrics.Writer) -> None:
        self.run, self.trainer, self.loader, self.writer = run, trainer, loader, writer
        self.pending: tuple[int, Outcome] | None = None
        self.flops = trainer.step_flops()
        self.read = loader.media_bytes
        self.restart()

    def restart(self) -> None:
        """Starts the clock of the next line anew."""
        self.start, self.steps, self.tokens = time.perf_counter(), 0, 0
        self.items = {item.reader.rate: 0 for item in self.loader.items}
        self.host_seconds = self.boundary_seconds = 0.0
        self.waited = self.loader.seconds_waited

    def step(self, step: int, microbatches: Sequence[Any], outcome: Outcome) -> None:
        """Takes note of a step that was dispatched; waits for the one before it, and for this one if a line is due."""
        self.settle()
        self.steps += 1
        self.tokens += sum(int((m["segment_ids"] > 0).sum()) for m in microbatches)
        for item in self.loader.items:
            self.items[item.reader.rate] += sum(count(m, item) for m in microbatches)
        self.host_seconds += outcome.host.dispatch_seconds
        self.boundary_seconds += outcome.host.boundary_seconds
        self.pending = (step, outcome)
        if self._due(step):
            self.settle()

    def settle(self) -> None:
        """Waits for the last step; says so if it was skipped, and writes its line where one is due."""
        if self.pending is None:
            return
        step, outcome = self.pending
        self.pending = None
        if not bool(outcome.ok):
            broken = ", ".join(self.trainer.finish.not_finite(outcome)[:5]) or "the loss"
            print(f"step {step} was skipped in every module: not finite: {broken}", flush=True)
        if self._due(step):
            self._write(step, outcome)

    def _due(self, step: int) -> bool:
        return step % self.run.log_every == 0 or step in self.run.ends

    def _write(self, step: int, outcome: Outcome) -> None:
        values: Values = {
            "loss": float(outcome.loss),
            "learning_rate": self.trainer.learning_rate(step),
            "gradient_norm": float(outcome.norm),
        }
        for name, squares in outcome.module_squares.items():
            values[f"gradient_norm/{name}"] = math.sqrt(sum(float(s.sum()) for s in squares))
        values |= routing({m.name: m.definition for m in self.trainer.graph.modules}, outcome)
        seconds = time.perf_counter() - self.start
        values |= {
            "tokens_per_second": self.tokens / seconds,
            **{rate: number / seconds for rate, number in self.items.items()},
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": self.loader.seconds_waited - self.waited,
            "host_share": self.host_seconds / seconds,
            "boundary_share": self.boundary_seconds / seconds,
        }
        pairs = enumerate(itertools.zip_longest(self.loader.media_bytes, self.read, fillvalue=0))
        values |= {f"media_bytes/{process}": now - before for process, (now, before) in pairs}
        values |= self._rates(seconds / self.steps)
        self.writer.write(step, values)
        self.read = self.loader.media_bytes
        self.restart()

    def _rates(self, step_seconds: float) -> Values:
        """Model TFLOP/s per device, MFU where the device's peak is known, and memory where the device tells."""
        values: Values = {}
        peak = flops.peak_flops(jax.devices()[0].device_kind)
        for name, step_flops in self.flops.items():
            rate = step_flops / step_seconds / self.trainer.graph.module(name).layout.num_devices
            values[f"tflops_per_device/{name}"] = rate / 1e12
            if peak is not None:
                values[f"mfu/{name}"] = rate / peak
        stats = [d.memory_stats() or {} for d in jax.local_devices()]
        peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
        used = max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        values["peak_memory_gib"] = used / 2**30  # of a device; of the process where devices do not tell
        return values


def routing(definitions: Mapping[str, ModuleDef], outcome: Outcome) -> Values:
    """The part of the loss that is routers' own, if they have one; for each layer with experts of these modules the
    tokens of the expert with most of them over the mean."""
    values: Values = {} if outcome.auxiliary is None else {"auxiliary_loss": float(outcome.auxiliary)}
    for name, loads in outcome.routed.items():
        routed = np.asarray(loads)
        kinds = getattr(definitions[name].config, "kinds", ("moe",) * len(routed))
        layers = [i for i, kind in enumerate(kinds) if kind == "moe"]
        largest = routed.max(1) / np.maximum(routed.mean(1), 1e-9)
        values |= {f"expert_load/{name}/{i}": float(load) for i, load in zip(layers, largest, strict=True)}
    return values
