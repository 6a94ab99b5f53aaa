"""Ends a run that does not go on, whatever its main thread hangs in: a watchdog of progress, not of life.

A process that hangs in a collective, or whose peer is stopped, lives, and nothing else would end it (no flag of jax
does on GPUs). A thread looks whether the run goes on; if it has not for too long, it prints what each stage of this
process waits for, and where every thread is, and ends the process. Each process of a run has a watchdog of its own, and
all hang when one does: so all print, and all end.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

from hetjax.core.progress import Progress
from hetjax.run import cluster

STATUS = 3  # the exit status of a run that did not go on
TICK = 0.5  # seconds between two looks


class Watch:
    """What the run is at, and for how long it may stay there without a task, an evaluation or a program more.

    Seconds in which this process itself was stopped (SIGSTOP, Ctrl-Z, a laptop's lid) do not count. `of`: what stands
    before the names of the limits where a user sets them."""

    def __init__(self, step_limit: float, start_limit: float, of: str = "Experiment.") -> None:
        self.step_limit, self._of = step_limit, of
        self._limits = {"step_limit": step_limit, "start_limit": start_limit}
        self._at = "its start", "start_limit"  # what, and whose limit is its
        self._beginnings = 0
        self._progress: Progress | None = None
        self._over = threading.Event()
        self._last, self._looked, self._waited = self._seen(), time.monotonic(), 0.0

    def steps(self, what: str) -> None:
        """The run is now at a step, or what stands between two: a save, an evaluation."""
        self._begins(what, "step_limit")

    def pauses(self, what: str) -> None:
        """The run is now at something else, of its start or its end."""
        self._begins(what, "start_limit")

    def _begins(self, what: str, setting: str) -> None:
        self._at = what, setting
        self._beginnings += 1

    @property
    def at(self) -> str:
        """What the run is at."""
        return self._at[0]

    def follow(self, progress: Progress) -> None:
        """Whose tasks count from here on."""
        self._progress = progress

    def close(self) -> None:
        """Nothing is watched any more."""
        self._over.set()

    def run(self) -> None:
        """Looks until it is closed, or ends the process; what the thread does."""
        while not self._over.wait(TICK):
            if not self.goes_on(time.monotonic()):
                self._end()

    def goes_on(self, now: float) -> bool:
        """Whether something has happened within the limit, at a look at the clock's second `now`."""
        seen = self._seen()
        self._waited = self._waited + min(now - self._looked, 2 * TICK) if seen == self._last else 0.0
        self._last, self._looked = seen, now
        return self._waited <= self._limits[self._at[1]]

    def _seen(self) -> tuple[int, int]:
        return self._beginnings, self._progress.count if self._progress else 0

    def _end(self) -> None:
        what, setting = self._at
        limit = self._limits[setting]
        lines = [f"{cluster.who()}nothing has happened for {self._of}{setting}={limit:g} s, in {what}"]
        with contextlib.suppress(Exception):  # whatever it is, the end must come
            lines += self._progress.lines() if self._progress else []
        os.write(2, "\n".join([f"error: {lines[0]}", *(f"  {line}" for line in lines[1:]), ""]).encode())
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(2, all_threads=True)
        if cluster.is_one_of_several():
            time.sleep(limit / 10)  # the first one's end takes the others with it, which shall have said theirs
        os._exit(STATUS)


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[Watch]:
    """A watch whose thread looks until the end of the block; at first the run is at its start."""
    thread = threading.Thread(target=watch.run, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watch
    except BaseException as error:
        error.add_note(f"in {watch.at}")
        raise
    finally:
        watch.close()
        thread.join()
