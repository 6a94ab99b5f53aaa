"""Trains: build, open the data, compile, restore, then step, log, evaluate and save until the last step.

    python -m hetjax.train --gin_file=configs/quickstart.gin --workdir=runs/quickstart

Called again with the same --workdir it continues from the newest checkpoint. SIGTERM, or Ctrl-C, saves and exits with
status 0; a second Ctrl-C stops at once.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from hetjax.core import memory
from hetjax.core.trainer import State, Trainer
from hetjax.data import Loader
from hetjax.hf import initial
from hetjax.run import checkpoint, command, config, evaluate, experiment, metrics, record, samples
from hetjax.run.checkpoint import CheckpointError, Checkpoints, OtherArraysError
from hetjax.run.experiment import Experiment
from hetjax.run.log import Log


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 trained or saved after a signal, 2 for what the user can fix."""
    arguments = command.parse_arguments(argv)
    try:
        run = config.load(arguments.gin_files, arguments.bindings, Experiment)
        run = record.dated(run, Path(arguments.workdir))
        files = [f"# {path}\n{Path(path).read_text()}" for path in arguments.gin_files]
        asked = "\n".join([*files, "# command line", *arguments.bindings, ""])
        train(run, Path(arguments.workdir), {"config.gin": asked, record.OPERATIVE: config.operative(run)})
    except (ValueError, CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def train(run: Experiment, workdir: Path, asked: Mapping[str, str] | None = None) -> None:
    """Trains `run` to its last step, or to a signal, with everything that is written in `workdir`.

    `asked`: file name -> text, what the run was asked for; written there once nothing speaks against the run."""
    experiment.start(run)
    trainers = [experiment.build(run, phase) for phase in range(len(run.training))]
    print(trainers[0].picture(), flush=True)
    for name, boundary in trainers[0].pipeline.boundaries.items():
        payload, wire = (n * run.num_microbatches / 2**20 for n in (boundary.payload_bytes, boundary.wire_bytes))
        print(f"{name}: {payload:.2f} MiB cross in a step each way, {wire:.2f} MiB of them between device sets")
    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(_signalled())
        loader = stack.enter_context(experiment.train_loader(run))
        held_out = experiment.held_out_loader(run)
        if held_out is not None:
            stack.enter_context(held_out)
        directory, readers = workdir / "checkpoints", {e.name: e.items.reader for e in run.encoders}
        resumes = bool(checkpoint.steps_in(directory))
        resized = [e.name for e in run.encoders if e.resize_positions]
        starts = {} if resumes else initial.open_starts(trainers[0].graph, run.init_from, readers, resized=resized)
        record.make(workdir)
        checkpoints = stack.enter_context(Checkpoints(directory, keep=run.keep))
        resumed = checkpoints.latest
        if resumes and (resumed is None or resumed > run.ends[-1]):
            what = "none is complete" if resumed is None else f"the newest is of step {resumed}"
            raise CheckpointError(
                f"{directory} has checkpoints, of which {what}; this run ends at step {run.ends[-1]}: set its steps "
                "(Experiment.steps, or those of its phases) to at least that, or use another workdir"
            )
        first = run.phase_of(resumed or 0)
        state = _ready(run, trainers, first, loader, checkpoints, starts)
        record.write(workdir, asked or {}, resumed)
        writer = stack.enter_context(
            metrics.open_writers(workdir, num_steps=run.ends[-1], resumed_step=resumed, tensorboard=run.tensorboard)
        )
        for trainer, end in zip(trainers[first:], run.ends[first:], strict=True):
            state = state if trainer is trainers[first] else trainer.begin(state)
            log = Log(run, trainer, loader, writer)
            while state.step < end and not stopped:
                microbatches = loader.next_step(run.num_microbatches)
                state, outcome = trainer.step(state, microbatches)
                log.step(state.step, microbatches, outcome)
                evaluates = run.eval_every and state.step % run.eval_every == 0 and state.step < run.ends[-1]
                if held_out is not None and evaluates:
                    writer.write(state.step, evaluate.values(trainer, state, held_out, run.eval_microbatches))
                    _show(run, trainer, state, held_out, writer)
                    log.restart()
                if state.step % run.save_every == 0:
                    checkpoints.save(trainer, state, loader.state())
            log.settle()
            checkpoints.save(trainer, state, loader.state())
            if stopped:
                break
        if stopped:
            name = signal.Signals(stopped[0]).name
            print(f"{name}: saved step {state.step} in {checkpoints.directory}; the same command continues", flush=True)
        elif held_out is not None and not _finished(workdir, state.step):
            values = evaluate.last_values(trainer, state, loader, held_out, run.eval_microbatches)
            _show(run, trainer, state, held_out, writer)
            writer.write(state.step, values)
        _report_data(loader)


def _ready(
    run: Experiment,
    trainers: Sequence[Trainer],
    first: int,
    loader: Loader,
    checkpoints: Checkpoints,
    starts: Mapping[str, initial.Start],
) -> State:
    """The state from which phase `first` goes on, with all programs compiled: of the newest checkpoint, else step 0."""
    resumed = checkpoints.latest
    if resumed is not None:  # whatever is wrong shows before the long part
        try:
            loader.restore(checkpoints.check(trainers[first], resumed))
        except OtherArraysError as error:
            changed = record.changed(checkpoints.directory.parent, config.operative(run))
            raise OtherArraysError(f"{changed}: {error}" if changed else str(error)) from error
    for phase, trainer in enumerate(trainers[first:], first):
        if run.ends[phase] > (resumed or 0) or trainer is trainers[-1]:  # a phase that is over only hands on
            print(f"phase {phase + 1} of {len(trainers)}: steps {trainer.spec.first_step + 1} to {run.ends[phase]}")
            _compile(trainer, evaluates=run.held_out is not None)
    if resumed is None:
        return initial.state(trainers[0], starts)
    state, _ = checkpoints.restore(trainers[first], resumed)
    print(f"resumed from {checkpoints.directory} at step {resumed}", flush=True)
    return state


def _compile(trainer: Trainer, *, evaluates: bool) -> None:
    """Compiles every program, prints the memory that they need, and raises ValueError where there is less."""
    start = time.perf_counter()
    live = sys.stdout.isatty()

    def report(name: str, done: int, total: int) -> None:
        if live:
            print(f"\r\033[Kcompiled {done}/{total} programs: {name}", end="", flush=True)

    trainer.compile(report, evaluate=evaluates, others=checkpoint.programs(trainer))
    clear = "\r\033[K" if live else ""
    print(f"{clear}compiled every program in {time.perf_counter() - start:.1f} s", flush=True)
    needed = memory.estimate(trainer)
    print(memory.table(needed), flush=True)
    memory.check(needed, memory.available(jax.devices()))


def _show(run: Experiment, trainer: Trainer, state: State, held_out: Loader, writer: metrics.Writer) -> None:
    """Writes what the model answers to some held-out questions, if the run asks for it."""
    if run.eval_samples:
        found = samples.take(trainer, state, held_out, count=run.eval_samples, tokens=run.eval_sample_tokens)
        writer.show(state.step, found)


@contextlib.contextmanager
def _signalled() -> Iterator[list[int]]:
    """A list that SIGTERM and the first Ctrl-C make true; the loop looks at it between steps."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])  # a second one does what it always did

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_data(loader: Loader) -> None:
    fill = ", ".join(f"{name} {share:.0%}" for name, share in loader.fill().items())
    print(f"not padding: {fill}; {loader.tally.report()}")


def _finished(workdir: Path, step: int) -> bool:
    """Whether an earlier call wrote the last evaluation."""
    records = metrics.read_jsonl(workdir / metrics.FILE)
    return any(r["step"] == step and "eval/accuracy_prior" in r for r in records)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
