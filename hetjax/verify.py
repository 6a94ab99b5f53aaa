"""Trains a config's model under its layouts and through the reference on the same data, and shows the differences.

    hetjax verify --gin_file=configs/quickstart.gin --steps=3 --dtype=float64

Exit status 0: every step's loss and every leaf are within tolerance; 1: one is not; 2: the run cannot be built.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from hetjax.core import budget, memory
from hetjax.core.trainer import Trainer
from hetjax.data import Loader
from hetjax.judge.compare import StepReport, Worst, compare, compare_initial
from hetjax.judge.reference import Reference
from hetjax.run import cluster, command, config, experiment, several
from hetjax.run.experiment import Experiment
from hetjax.run.shrink import in_precision, shrunk
from hetjax.run.watchdog import Watch


class Tolerance(NamedTuple):
    """What a run may differ by: losses relatively, leaves by their formula at the first step and later, and in
    `routed` the share of tokens' choices of experts: one that stands between two goes where rounding sends it.

    Later steps start from parameters that already differ by rounding, which training amplifies. Parameters after an
    update are judged by what the reference makes of the same gradients, so theirs stay as they are."""

    loss: float
    first: float
    later: float
    params: float
    routed: float


# bfloat16 has 8 bits: two orders of the same sums differ in the second or third digit of a gradient.
TOLERANCES = {
    "float64": Tolerance(1e-9, 1e-11, 1e-8, 1e-11, 1e-12),
    "float32": Tolerance(1e-5, 1e-5, 1e-3, 1e-5, 1e-2),
    "bfloat16": Tolerance(1e-2, 5e-2, 2e-1, 1e-5, 0.1),
}
INITIAL = 1e-6  # of the values at step 0, which are drawn in float32


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    parser = command.new_parser("verify", __doc__)
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="training steps to compare (default 2)")
    parser.add_argument(
        "--dtype",
        choices=list(TOLERANCES),
        default="float64",
        help="of both sides (default float64); bfloat16: of activations alone",
    )
    parser.add_argument("--shrink", action="store_true", help="a small model of the same layers and layouts")
    arguments = command.parse_arguments(argv, parser, needs_workdir=False)
    flags = arguments.flags
    try:
        if flags.steps < 1:
            raise ValueError(f"--steps={flags.steps}; compare at least 1")
        run = config.load(arguments.gin_files, arguments.bindings, Experiment)
        run = in_precision(shrunk(run) if flags.shrink else run, flags.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    watch = Watch(run.step_limit, run.start_limit)
    return several.together(lambda: verify(run, flags, watch), watch)


def verify(run: Experiment, flags: argparse.Namespace, watch: Watch) -> int:
    """The exit status. Of several processes each is a judge, with the arrays of all."""
    try:
        experiment.start(run)
        jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would take float32 products in tf32
        trainers = [experiment.build(run, phase) for phase in range(len(run.training))]
        if budget.asked(trainers[0]):
            for trainer in trainers:  # as a run on these devices would
                budget.settle(trainer, memory.available(jax.devices()))
        print(f"{trainers[0].picture()}\n", flush=True)
        if run.init_from:
            print("Experiment.init_from is not read here: both sides start from the values drawn for Experiment.seed")
        failed = _failed_steps(run, trainers, flags.steps, TOLERANCES[flags.dtype], watch)
    except ValueError as error:
        print(f"error: {cluster.who()}{error}", file=sys.stderr)
        return 2
    print(f"FAILED: {failed} step(s) beyond tolerance" if failed else "every layout trains as one device does")
    return 1 if failed else 0


def _failed_steps(run: Experiment, trainers: Sequence[Trainer], steps: int, tolerance: Tolerance, watch: Watch) -> int:
    """The number of steps, and of modules at the start, beyond tolerance."""
    reference = Reference(trainers[0].graph, trainers[0].spec.optimizer)
    failed = _print_initial(compare_initial(trainers[0]))
    with experiment.train_loader(run) as loader:  # all of it, for the reference
        for phase, trainer in enumerate(trainers, 1):
            print(f"phase {phase} of {len(trainers)}", flush=True)
            trainer.compile(lambda _, done, total: watch.pauses(f"compiling, with {done} of {total} programs done"))
            cluster.meet(f"compiled phase {phase}")
            watch.follow(trainer.pipeline.progress)
            data = (_next(loader, run.num_microbatches, n, watch) for n in range(steps))
            judged = lambda n: watch.pauses(f"the reference's step {n}")
            reports = compare(trainer, data, reference.with_config(trainer.spec.optimizer), judges=judged)
            failed += _print_reports(reports, tolerance)
    return failed


def _next(loader: Loader, num_microbatches: int, step: int, watch: Watch) -> Sequence[Mapping[str, np.ndarray]]:
    """The microbatches of a step, which begins."""
    watch.steps(f"step {step}")
    return loader.next_step(num_microbatches)


def _print_initial(found: Mapping[str, Worst]) -> int:
    """The number of modules whose parameters do not start as one device makes them."""
    for name, worst in found.items():
        print(f"  {name:<10} initial    {worst.error:.1e} (at most {INITIAL:.0e})  worst: {worst.leaf}", flush=True)
    return sum(not worst.error <= INITIAL for worst in found.values())


def _print_reports(reports: Iterable[StepReport], tolerance: Tolerance) -> int:
    """The number of steps beyond tolerance."""
    failed = 0
    for report in reports:
        leaves = tolerance.later if report.step else tolerance.first
        good = report.within(loss=tolerance.loss, leaves=leaves, params=tolerance.params, routed=tolerance.routed)
        failed += not good
        verdict = "within" if good else "BEYOND"
        print(
            f"step {report.step}: loss {report.loss:.6f}, reference {report.reference_loss:.6f}, "
            f"difference {report.loss_error:.1e} (at most {tolerance.loss:.0e}): {verdict} tolerance"
        )
        if report.routed:
            print(f"  choices of experts that differ: {report.routed:.1e} of all (at most {tolerance.routed:.0e})")
        for name in report.gradients:
            kinds = (("gradients", report.gradients, leaves), ("optimizer", report.state, leaves))
            for kind, found, bound in (*kinds, ("parameters", report.params, tolerance.params)):
                if name in found:
                    worst = f"{found[name].error:.1e} (at most {bound:.0e})  worst: {found[name].leaf}"
                    print(f"  {name:<10} {kind:<10} {worst}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
