"""Work that is done ahead by threads, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(workers: Iterable[Callable[[T], R]], items: Iterable[T], ahead: int) -> Generator[R, None, None]:
    """What a call gives for each item, in their order; `ahead` of them are done, or begun, before they are wanted.

    Threads and not processes: reading and checksums release the interpreter's lock, and what they give is in memory
    that needs no copy. The threads end with the generator; a process that ends does not wait for them.

    Args:
        workers: a call for each thread, which it alone makes.

    Raises:
        what a call raises, where its item would have come.
    """
    todo: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    over = threading.Event()

    def work(call: Callable[[T], R]) -> None:
        while (one := todo.get()) is not None and not over.is_set():
            future, item = one
            try:
                future.set_result(call(item))
            except BaseException as error:  # is raised where the result is wanted
                future.set_exception(error)

    threads = [
        threading.Thread(target=work, args=(call,), name=f"reads ahead {n}", daemon=True)
        for n, call in enumerate(workers)
    ]
    for thread in threads:
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
