"""Trains: build, open the data, compile, restore, then step, log, evaluate and save until the last step.

    hetjax train --gin_file=configs/quickstart.gin --workdir=runs/quickstart
    hetjax train --gin_file=configs/quickstart.gin --workdir=runs/short --gin.experiment.Experiment.steps=100

Called again with the same --workdir it continues from the newest checkpoint. SIGTERM, or Ctrl-C, saves and exits with
status 0; a second Ctrl-C, or an error, saves the last complete step if it can, and says which one lies where.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hetjax.core import memory
from hetjax.core.trainer import State, Trainer
from hetjax.data import Loader
from hetjax.hf import export, initial
from hetjax.run import (
    agreement,
    boards,
    checkpoint,
    cluster,
    command,
    config,
    ending,
    evaluate,
    experiment,
    media,
    metrics,
    named,
    profiles,
    recompute,
    record,
    stage_costs,
    terminal,
    watchdog,
)
from hetjax.run.checkpoint import CheckpointError, Checkpoints, OtherArraysError
from hetjax.run.experiment import Experiment
from hetjax.run.loop import Loop
from hetjax.run.watchdog import Watch


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 trained or saved after a signal, 2 for what the user can fix. Other errors go through."""
    arguments = command.parse_arguments(argv, command.new_parser("train", __doc__))
    try:
        run = config.load(arguments.gin_files, arguments.bindings, Experiment)
        run = record.dated(run, Path(arguments.workdir))
        asked = config.asked(arguments.gin_files, arguments.bindings)
        workdir, start = Path(arguments.workdir), time.perf_counter()
        train(run, workdir, {"config.gin": asked, record.OPERATIVE: config.operative(run)})
        records, kept = metrics.read_jsonl(workdir / metrics.FILE), checkpoint.steps_in(workdir / "checkpoints")
        seconds = time.perf_counter() - start
        print(terminal.summary(workdir, records, num_steps=run.ends[-1], kept=kept, seconds=seconds))
    except (ValueError, CheckpointError) as error:
        said = " ".join(str(error).split())
        print(f"error: {cluster.who()}{said}", file=sys.stderr)
        return cluster.end(2, said)
    except BaseException:
        cluster.end_by_error()
        raise
    return 0


def train(run: Experiment, workdir: Path, asked: Mapping[str, str] | None = None) -> None:
    """Trains `run` to its last step, or to a signal, with everything that is written in `workdir`.

    `asked`: file name -> text, what the run was asked for; written there once nothing speaks against the run."""
    with watchdog.watched(Watch(run.step_limit, run.start_limit)) as watch:
        cluster.join_as_told(run.step_limit)
        _train(run, workdir, asked or {}, watch)
        cluster.leave()


def _train(run: Experiment, workdir: Path, asked: Mapping[str, str], watch: Watch) -> None:
    boards.check(tensorboard=run.tensorboard, wandb=run.wandb)
    if run.schedule_costs == "measured":
        stage_costs.check(workdir)
    experiment.start(run)
    trainers = [experiment.build(run, phase) for phase in range(len(run.training))]
    _draw(trainers[0])
    cluster.agree(lambda: agreement.decides(workdir, asked.get(record.OPERATIVE, ""), trainers))
    with contextlib.ExitStack() as stack:
        signalled = stack.enter_context(ending.signalled())
        stopped = () if cluster.is_one_of_several() else signalled  # none ends an evaluation alone
        here = media.here(run, trainers[0])
        loader = stack.enter_context(experiment.train_loader(run, trainers[0].prepare, here))
        held_out = experiment.held_out_loader(run, here)
        if held_out is not None:
            evaluate.check(loader, stack.enter_context(held_out))
        cluster.agree(lambda: {"data": loader.digest, "held-out data": held_out.digest if held_out else ""})
        directory = workdir / "checkpoints"
        starts = {} if checkpoint.steps_in(directory) else _starts(run, trainers[0])
        _say_unless_exported(run, workdir)
        stack.enter_context(record.made(workdir))
        checkpoints = stack.enter_context(_open_checkpoints(run, workdir))
        resumed = checkpoints.latest
        cluster.agree(lambda: {"newest checkpoint": str(resumed)})
        first = run.phase_of(resumed or 0)
        state = _ready(run, trainers, first, loader, checkpoints, starts, watch)
        files = {**asked, record.SCHEDULE: record.promised(trainers)}
        record.write(workdir, files, resumed, trains=resumed is None or resumed < run.ends[-1])
        for line in profiles.missed(run, workdir, resumed or 0):
            print(line, flush=True)
        evaluated = resumed if metrics.has(workdir, resumed, "eval/loss") else None
        viewers = dict[str, Any](tensorboard=run.tensorboard, wandb=run.wandb)
        writer = stack.enter_context(
            metrics.open_writers(workdir, num_steps=run.ends[-1], resumed_step=resumed, **viewers)
        )
        last = stack.enter_context(ending.saved(checkpoints, watch))
        where = workdir, loader, held_out, writer, checkpoints
        loop = Loop(run, *where, last, watch, signalled, stopped, evaluated)
        for trainer, end in zip(trainers[first:], run.ends[first:], strict=True):
            state = state if trainer is trainers[first] else trainer.begin(state)
            state = loop.train(trainer, state, end)
            if loop.over:
                break
        loop.evaluate_last(trainer, state)
        watch.pauses("its end")
        if loop.over or stopped:
            checkpoints.wait()
            _say_stopped(signalled, state.step, checkpoints.directory)
        _report_data(loader)


def _say_unless_exported(run: Experiment, workdir: Path) -> None:
    refusal = export.refusal(run, workdir)
    if refusal:
        print(f"no export: python -m hetjax.convert to_hf will refuse it whole: {refusal}", flush=True)


def _say_stopped(signalled: Sequence[signal.Signals], step: int, where: Path) -> None:
    who = signalled[0].name if signalled else "a signal to another process"
    print(f"{who}: saved step {step} in {where}; the same command continues", flush=True)


def _draw(trainer: Trainer) -> None:
    """Prints which device holds what, what crosses between modules in a step, and what the schedule promises."""
    print(trainer.picture(), flush=True)
    pipeline = trainer.pipeline
    for link in pipeline.between.values():
        times = len(pipeline.stages[link.source].plan.share.of(trainer.spec.num_microbatches))
        payload, wire = (n * times / 2**20 for n in (link.boundary.payload_bytes, link.boundary.wire_bytes))
        print(f"{link.name}: {payload:.2f} MiB cross in a step each way, {wire:.2f} MiB are put between devices")
    print(pipeline.promise(), flush=True)


def _starts(run: Experiment, trainer: Trainer) -> Mapping[str, initial.Start]:
    """What the modules of a run that begins start from."""
    readers = {e.name: e.items.reader for e in run.encoders}
    resized = [e.name for e in run.encoders if e.resize_positions]
    return initial.open_starts(trainer.graph, run.init_from, readers, resized=resized)


def _open_checkpoints(run: Experiment, workdir: Path) -> Checkpoints:
    """The run's checkpoints, with a line for what earlier calls left and this one will not go on from.

    Raises CheckpointError if the run ends before the newest, ValueError for damaged metrics."""
    directory = workdir / "checkpoints"
    steps, written = checkpoint.steps_in(directory), metrics.last_step(workdir)
    for path in checkpoint.unfinished_in(directory):
        behind = f"goes on from step {max(steps)}" if steps else "starts over"
        print(f"{path} was left unfinished; {behind}", flush=True)
    if written and not steps:
        print(f"{directory} holds no checkpoint: starts over, and so does {metrics.FILE}, which went to step {written}")
    checkpoints = Checkpoints(directory, keep=run.keep)
    newest = checkpoints.latest
    if steps and (newest is None or newest > run.ends[-1]):
        what = "none is complete" if newest is None else f"the newest is of step {newest}"
        raise CheckpointError(
            f"{directory} has checkpoints, of which {what}; this run ends at step {run.ends[-1]}: set its steps "
            "(Experiment.steps, or those of its phases) to at least that, or use another workdir"
        )
    return checkpoints


def _ready(
    run: Experiment,
    trainers: Sequence[Trainer],
    first: int,
    loader: Loader,
    checkpoints: Checkpoints,
    starts: Mapping[str, initial.Start],
    watch: Watch,
) -> State:
    """The state from which phase `first` goes on, with all programs compiled: of the newest checkpoint, else step 0."""
    resumed = checkpoints.latest
    if resumed is not None:  # whatever is wrong shows before the long part
        try:
            loader.restore(checkpoints.check(trainers[first], resumed))
        except OtherArraysError as error:
            changed = record.changed(checkpoints.directory.parent, config.operative(run))
            raise OtherArraysError(f"{changed}: {error}" if changed else str(error)) from error
    first_microbatch = loader.read_first(endless=True) if (resumed or 0) < run.ends[-1] else None
    for phase, trainer in enumerate(trainers[first:], first):
        if run.ends[phase] > (resumed or 0) or trainer is trainers[-1]:  # a phase that is over only hands on
            print(f"phase {phase + 1} of {len(trainers)}: steps {trainer.spec.first_step + 1} to {run.ends[phase]}")
            recompute.settle(trainer, checkpoints.directory.parent, phase, memory.available(jax.devices()))
            _compile(trainer, watch, evaluates=run.held_out is not None)
            if run.schedule_costs == "measured" and first_microbatch is not None:
                watch.pauses("measuring the stages")
                stage_costs.settle(trainer, checkpoints.directory.parent, phase, first_microbatch)
                _check_memory(trainer)
    watch.pauses("the first state")
    if resumed is None:
        return initial.state(trainers[0], starts)
    state, _ = checkpoints.restore(trainers[first], resumed)
    print(f"resumed from {checkpoints.directory} at step {resumed}", flush=True)
    return state


def _compile(trainer: Trainer, watch: Watch, *, evaluates: bool) -> None:
    """Compiles every program, prints the memory that they need, and raises ValueError where there is less."""
    start = time.perf_counter()
    live = sys.stdout.isatty()

    def report(name: str, done: int, total: int) -> None:
        watch.pauses(f"compiling, with {done} of {total} programs done")
        if live:
            print(f"\r\033[Kcompiled {done}/{total} programs: {name}", end="", flush=True)

    trainer.compile(report, evaluate=evaluates, others=named.programs(trainer))
    cluster.meet(f"compiled from step {trainer.spec.first_step}")
    clear = "\r\033[K" if live else ""
    print(f"{clear}compiled every program in {time.perf_counter() - start:.1f} s", flush=True)
    _check_memory(trainer)


def _check_memory(trainer: Trainer) -> None:
    needed = memory.estimate(trainer)
    print("of process 0's devices:\n" * cluster.is_one_of_several() + memory.table(needed), flush=True)
    memory.check(needed, memory.available(jax.devices()))


def _report_data(loader: Loader) -> None:
    fill = ", ".join(f"{name} {share:.0%}" for name, share in loader.fill().items())
    read = ", ".join(f"{size / 2**20:.1f}" for size in loader.media_bytes)
    each = " (by process)" if len(loader.media_bytes) > 1 else ""
    print(f"not padding: {fill}; MiB of pictures and clips read: {read or 0}{each}; {loader.tally.report()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
