"""Work done before it is asked for: samples in parallel threads, microbatches in one. Never changes their order."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; at the end they finish what they do, and begin nothing more."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="hetjax-read")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[A], B], inputs: Iterable[A], ahead: int
) -> Generator[tuple[A, B], None, None]:
    """(input, result) for each input, in their order; the pool works on up to `ahead` of them before they are due."""
    pending: collections.deque[tuple[A, Future[B]]] = collections.deque()
    try:
        for value in inputs:
            pending.append((value, pool.submit(function, value)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()


class Ahead(Generic[A]):
    """Iterates over `source` from a background thread that keeps up to `depth` results ready; depth 0 uses no thread.

    An error of the source is raised where its result would have come, and at every call after that.
    """

    def __init__(self, source: Generator[A, None, None], depth: int) -> None:
        self.seconds_waited = 0.0
        self._source, self._depth = source, depth
        self._ready: collections.deque[A] = collections.deque()
        self._failure: BaseException | None = None  # StopIteration at the end
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hetjax-data", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> "Ahead[A]":
        return self

    def __next__(self) -> A:
        began = time.perf_counter()
        try:
            return self._take() if self._thread else self._make()
        finally:
            self.seconds_waited += time.perf_counter() - began

    def close(self) -> None:
        """Ends the thread and the source."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self._source.close()

    def _make(self) -> A:
        if self._failure:
            raise self._failure
        try:
            return next(self._source)
        except BaseException as error:
            self._failure = error
            raise

    def _take(self) -> A:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            raise self._failure or RuntimeError("the loader is closed")

    def _run(self) -> None:
        while not self._closed:
            try:
                result = next(self._source)
            except BaseException as error:  # it belongs to whoever asks for the result
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append(result)
                self._changed.notify_all()
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
