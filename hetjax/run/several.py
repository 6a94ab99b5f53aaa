"""A command that one process runs, or several together."""

import contextlib
from collections.abc import Callable

from hetjax.run import cluster, watchdog
from hetjax.run.watchdog import Watch


def together(command: Callable[[], int], watch: Watch) -> int:
    """The exit status of `command`, run once this process has joined those that it is told of, if it is; they leave
    together, unless one of them fails. Of several each watches whether the command goes on: another one may be dead."""
    try:
        with watchdog.watched(watch) if cluster.is_told() else contextlib.nullcontext():
            cluster.join_as_told(watch.step_limit)
            status = command()
            if status == 2:  # what the user can mend, said already
                return cluster.end(status)
            watch.pauses("its end")
            cluster.leave()
    except BaseException:  # out here it says what the command was at
        cluster.end_by_error()
        raise
    return status
