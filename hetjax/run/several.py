"""A command that one process runs, or several together."""

import traceback
from collections.abc import Callable

from hetjax.run import cluster


def together(command: Callable[[], int]) -> int:
    """The exit status of `command`, run once this process has joined those that it is told of, if it is; they leave
    together, unless one of them fails."""
    cluster.join_as_told()
    try:
        status = command()
    except BaseException:
        if cluster.is_one_of_several():
            traceback.print_exc()
        cluster.end(1)
        raise
    if status == 2:  # what the user can mend, said already
        return cluster.end(status)
    cluster.leave()
    return status
