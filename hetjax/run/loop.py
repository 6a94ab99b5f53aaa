"""The steps of a run, and what stands between two of them: evaluations, saves, looks at the devices, the word of a
signal."""

import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path

from hetjax.core.trainer import State, Trainer
from hetjax.data import Loader
from hetjax.run import cluster, evaluate, metrics, profiles, samples
from hetjax.run.checkpoint import Checkpoints
from hetjax.run.ending import Last
from hetjax.run.experiment import Experiment
from hetjax.run.log import Log
from hetjax.run.stragglers import Stragglers
from hetjax.run.watchdog import Watch


@dataclasses.dataclass
class Loop:
    """What a run's steps read and write. `signalled`: the signals that came so far; `stopped`: those that end an
    evaluation too, none where other processes take part in it. `evaluated`: the step that an earlier call evaluated."""

    run: Experiment
    workdir: Path
    loader: Loader
    held_out: Loader | None
    writer: metrics.Writer
    checkpoints: Checkpoints
    last: Last
    watch: Watch
    signalled: Sequence[signal.Signals]
    stopped: Sequence[signal.Signals]
    evaluated: int | None
    over: bool = False  # a signal has ended the run before its last step

    def train(self, trainer: Trainer, state: State, end: int) -> State:
        """The state behind step `end`, or behind the step at which a signal ends the run; it is saved."""
        log, stragglers = Log(self.run, trainer, self.loader, self.writer), Stragglers(trainer)
        stragglers.look(state.step, state.weights)
        self.watch.follow(trainer.pipeline.progress)
        while state.step < end and not self._ends(state.step):
            if self._evaluates(state.step):
                self._evaluate(trainer, state)
                log.restart()
                if self.stopped:
                    continue  # to the loop's own end
            state = self._step(trainer, state, log)
            if state.step % self.run.save_every == 0:
                self._save(trainer, state)
                stragglers.look(state.step, state.weights)
                log.restart()
        log.settle()
        self._save(trainer, state)
        return state

    def evaluate_last(self, trainer: Trainer, state: State) -> None:
        """The evaluation behind the last step, which tells more, unless there is none, or an earlier call made it."""
        if self.held_out is None or self.over or metrics.has(self.workdir, state.step, "eval/accuracy_prior"):
            return
        self.watch.steps(f"the evaluation behind step {state.step}")
        loaders, num = (self.loader, self.held_out), self.run.eval_microbatches
        self._write(trainer, state, evaluate.last_values(trainer, state, *loaders, num, self.stopped))

    def _ends(self, step: int) -> bool:
        self.over = cluster.ends(step, signalled=bool(self.signalled))
        return self.over

    def _evaluates(self, step: int) -> bool:
        every = self.run.eval_every
        return self.held_out is not None and bool(every and step and step % every == 0) and step != self.evaluated

    def _evaluate(self, trainer: Trainer, state: State) -> None:
        assert self.held_out is not None
        self.watch.steps(f"the evaluation behind step {state.step}")
        num = self.run.eval_microbatches
        self._write(trainer, state, evaluate.values(trainer, state, self.held_out, num, self.stopped))

    def _step(self, trainer: Trainer, state: State, log: Log) -> State:
        number = state.step + 1
        self.watch.steps(f"step {number}")
        microbatches = self.loader.next_step(self.run.num_microbatches)
        if number in (*self.run.timeline_steps, *self.run.profile_steps):
            log.settle()  # writes its line before that step's
        take = profiles.taken(self.run, trainer, self.workdir, self.writer, self.loader.last_wait, number)
        state, outcome = take(state, microbatches)
        self.last.keep(trainer, state, self.loader.state())
        log.step(state.step, microbatches, outcome)
        return state

    def _save(self, trainer: Trainer, state: State) -> None:
        self.watch.steps(f"the save of step {state.step}")
        self.checkpoints.save(trainer, state, self.loader.state())

    def _write(self, trainer: Trainer, state: State, values: metrics.Values) -> None:
        """Writes an evaluation, and what the model answers to some questions if the run asks for it; nothing once
        `stopped` holds something, which made it end early."""
        if self.stopped:
            return
        if self.run.eval_samples:
            assert self.held_out is not None
            how = dict(count=self.run.eval_samples, tokens=self.run.eval_sample_tokens)
            shown = bool(self.run.tensorboard or self.run.wandb) and cluster.is_primary()
            self.writer.show(state.step, samples.take(trainer, state, self.held_out, **how, pictures=shown))
        self.writer.write(state.step, values)
