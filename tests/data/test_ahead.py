"""Work done ahead: in order, no further than it may be, and over with whoever wanted it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import count, islice

import pytest

from distill.data.ahead import read_ahead


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_whoever_is_first(workers: int) -> None:
    def slow(n: int) -> int:
        time.sleep(0.01 * (n % 3))  # so that of three threads the later ones finish first
        return n * n

    assert list(islice(read_ahead([slow] * workers, count(), 6), 20)) == [n * n for n in range(20)]
    assert list(read_ahead([slow] * workers, range(4), 6)) == [0, 1, 4, 9]


def test_no_more_is_begun_than_may_lie_ahead() -> None:
    begun: list[int] = []
    results = read_ahead([begun.append] * 2, count(), 4)
    for n in range(5):
        next(results)
        time.sleep(0.02)
        assert len(begun) == n + 5


def test_an_error_comes_where_its_result_would_have() -> None:
    def refuses(n: int) -> int:
        if n == 3:
            raise OSError("three")
        return n

    results = read_ahead([refuses] * 2, count(), 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="three"):
        next(results)


def test_the_threads_end_with_what_they_work_for() -> None:
    results = read_ahead([lambda n: n] * 3, count(), 6)
    next(results)
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("reads ahead")]
    assert len(mine) >= 3 and all(thread.daemon for thread in mine)
    results.close()
    for thread in mine:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in mine)


def test_a_process_that_exits_in_the_middle_of_calls_is_not_aborted() -> None:
    """A thread that Python ends within torch's C++ code would take the whole process with it, by SIGABRT."""
    program = """
from itertools import count
import torch
from distill.data.ahead import read_ahead
square = torch.rand(600, 600)
def work(n):
    for _ in range(20):
        (square @ square).sum()
    return n
results = read_ahead([work] * 2, count(), 4)
print(next(results))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
