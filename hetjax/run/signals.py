"""Who hears of SIGTERM and Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def heard(receive: Callable[[int, Any], None]) -> Iterator[Mapping[signal.Signals, Any]]:
    """Inside, SIGTERM and Ctrl-C call `receive(number, frame)`; what each did before, by number, it does again behind
    it."""
    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
