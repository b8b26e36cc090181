"""Tasks that release the GIL, on all processors this process may use, without waiting in circles.

OpenMP's threads (torch's, and those of numba's own layers) spin at the end of every small operation until the slowest
is there. Where a training step is a thousand small operations, that doubles the processor time for nothing, and where
another program holds a core, it makes two threads fifteen times slower than one (benchmarks/results/threads.md). Here
the calling thread works on tasks itself, helpers take what is left, and helpers that have not begun are not waited for.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch

_limits: list[int] = []


def workers() -> int:
    """Threads to work on: as many as torch had when it was first asked (processors, or OMP_NUM_THREADS), and no more
    than `at_most` allows."""
    return min([_all_workers(), *_limits])


@lru_cache(maxsize=1)
def _all_workers() -> int:
    return torch.get_num_threads()


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Work on no more threads inside, in all threads of this process."""
    _limits.append(count)
    try:
        yield
    finally:
        _limits.remove(count)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's operations on `count` threads inside, as before afterwards."""
    workers()  # remembers what there was
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=4)
def _pool(helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(helpers, thread_name_prefix="sv4d", initializer=_begin_helper)


def _begin_helper() -> None:
    """A helper works on one core, and like the thread that trains (both are every thread's own matter)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def run_in_threads(tasks: Sequence[Callable[[], Any]]) -> None:
    """Run tasks that release the GIL on `workers()` threads; the first exception is raised here."""
    waiting = deque(tasks)

    def work() -> None:
        while True:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            task()

    at_once = workers()  # asked once: another thread may limit it meanwhile
    futures = [_pool(at_once - 1).submit(work) for _ in range(min(at_once, len(waiting)) - 1)]
    try:
        work()
    finally:
        begun = [future for future in futures if not future.cancel()]
        for future in begun:
            future.exception()
    for future in begun:
        future.result()


PROBE_ROWS, PROBE_REPEATS = 4096, 12


def useful_threads() -> int:
    """How many threads torch's large operations are fastest on just now: all, or one where others keep cores busy."""
    if workers() == 1:
        return 1
    values, weight = torch.ones(PROBE_ROWS, 64), torch.ones(64, 64)
    seconds = {}
    for count in (workers(), 1):
        with torch_threads(count):
            torch.relu(values @ weight)  # threads are made
            began = perf_counter()
            for _ in range(PROBE_REPEATS):
                torch.relu(values @ weight)
            seconds[count] = perf_counter() - began
    return min(seconds, key=lambda count: seconds[count])
