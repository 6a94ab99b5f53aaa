"""One run at a time in a workdir: a lock on DIR/lock that dies with its process, so that no restart is kept out."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

FILE = "lock"


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """The workdir for this process alone; commands that read it need no lock.

    Raises ValueError, with process and host, if another run holds it. A file system that knows no locks is named, and
    the run goes on."""
    with _locked(workdir) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            (workdir / FILE).unlink(missing_ok=True)


def _locked(workdir: Path) -> TextIO:
    """The open file, locked until it is closed."""
    path = workdir / FILE
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read() or "another process"
            file.close()
            raise ValueError(
                f"--workdir={workdir} is in use by {who}; wait for its end, or name another directory"
            ) from error
        except OSError as error:
            print(
                f"{workdir} cannot be locked ({error.strerror}): let no other run use it at the same time", flush=True
            )
            return file
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # its holder ended in between, and removed it
