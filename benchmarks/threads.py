"""What the second thread is worth in a training step, and what it costs beside other programs.

    python benchmarks/threads.py GRID --out benchmarks/results/threads.md

GRID is a run's folder `views`. A field is fitted to it up to the middle of its schedule; from there the same steps are
taken with torch's operations and the project's own kernels (`utils/threads.py`) on one or more threads, in turn, on the
machine as it is and then with a process beside them that keeps every core but one busy.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import tyro

from sv4d_ns.fitting.fit import FitOptions, GridFit
from sv4d_ns.utils import threads
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.views.grid import ViewGrid

SCHEDULE, MIDDLE = 2400, 1000
WAYS = ((1, 1), (2, 2), (1, 2), (1, 4), (1, None))
"""torch's threads, and those of the project's own work; None is as a run chooses (`threads.useful_threads`)."""


def main(grid: Path, /, out: Path, steps: int = 20, rounds: int = 2, busy_steps: int = 4) -> None:
    """Measure and write the table.

    Args:
        grid: a view grid.
        out: the table.
        steps: of each measurement on the machine as it is.
        rounds: measurements of each way; the fastest counts.
        busy_steps: steps of each measurement beside busy processes, which can be a hundred times slower.
    """
    torch.set_num_threads(1)
    fit = GridFit(ViewGrid.load(grid), FitOptions(SCHEDULE)).run(MIDDLE)
    rows = {way: [min(measured(fit, way, steps) for _ in range(rounds))] for way in WAYS}
    with busy_cores():
        for way, row in rows.items():
            row.append(measured(fit, way, busy_steps))
    text = table(rows)
    print(text)
    with atomic_path(out) as path:
        path.write_text(f"    python benchmarks/threads.py GRID ({os.cpu_count()} cores)\n\n{text}\n")


def measured(fit: GridFit, way: tuple[int, int | None], steps: int) -> tuple[float, float]:
    """Seconds on the wall and of processor time of a step."""
    of_torch, ours = way
    threads._all_workers = lambda: os.cpu_count() or 1  # type: ignore[assignment]
    chosen = ours or threads.useful_threads()
    threads._all_workers = lambda: chosen  # type: ignore[assignment]
    threads._pool.cache_clear()
    with_threads = fit.copy()
    torch.set_num_threads(of_torch)
    with_threads.run(MIDDLE + 2)
    wall, processor = time.perf_counter(), time.process_time()
    with_threads.run(MIDDLE + 2 + steps)
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps


@contextmanager
def busy_cores() -> Iterator[None]:
    """Processes that keep every core but one busy, at a higher priority where that is allowed."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=spin, daemon=True) for _ in range(max((os.cpu_count() or 1) - 1, 1))]
    for other in others:
        other.start()
    time.sleep(1)
    yield
    for other in others:
        other.kill()


def spin() -> None:
    """Work that never ends."""
    while True:
        pass


def table(rows: dict[tuple[int, int | None], list[tuple[float, float]]]) -> str:
    """Milliseconds a step."""
    lines = ["| torch | our own | idle: wall, ms | idle: CPU, ms | busy: wall, ms |", "|---|---|---|---|---|"]
    for (of_torch, ours), (idle, busy) in rows.items():
        lines.append(
            f"| {of_torch} | {ours or 'chosen'} | {1e3 * idle[0]:.0f} | {1e3 * idle[1]:.0f} | {1e3 * busy[0]:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
