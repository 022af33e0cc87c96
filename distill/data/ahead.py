"""Work that is done ahead by threads, in order."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

EXIT_WAITS_SECONDS = 5.0
_exiting = threading.Event()
_running: dict[threading.Thread, SimpleQueue[Any]] = {}  # and what each takes its work from


def read_ahead(workers: Iterable[Callable[[T], R]], items: Iterable[T], ahead: int) -> Generator[R, None, None]:
    """What a call gives for each item, in their order; `ahead` of them are done, or begun, before they are wanted.

    Threads and not processes: reading and checksums release the interpreter's lock, and what they give is in memory
    that needs no copy. The threads end with the generator. A process that exits lets each finish the call it is in, for
    a few seconds at most: a read may hang.

    Args:
        workers: a call for each thread, which it alone makes.

    Raises:
        what a call raises, where its item would have come.
    """
    todo: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    over = threading.Event()

    def work(call: Callable[[T], R]) -> None:
        while (one := todo.get()) is not None and not over.is_set() and not _exiting.is_set():
            future, item = one
            try:
                future.set_result(call(item))
            except BaseException as error:  # is raised where the result is wanted
                future.set_exception(error)
        _running.pop(threading.current_thread(), None)

    threads = [
        threading.Thread(target=work, args=(call,), name=f"reads ahead {n}", daemon=True)
        for n, call in enumerate(workers)
    ]
    for thread in threads:
        _running[thread] = todo
        thread.start()
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(Future())
            todo.put((pending[-1], item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        over.set()
        for _ in threads:
            todo.put(None)


@atexit.register
def _finish_calls() -> None:
    """Python ends a daemon thread where it next needs the interpreter; within C++ code that aborts the process."""
    _exiting.set()
    until = time.monotonic() + EXIT_WAITS_SECONDS
    threads = dict(_running)
    for todo in threads.values():
        todo.put(None)
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
