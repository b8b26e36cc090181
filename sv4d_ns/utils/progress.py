"""What a long job tells its user: bars with an ETA, and beforehand about how long it will take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

Progress = Callable[[int, int], None]
"""Called with (done, total) while a long job goes on."""


def _progress() -> "rich.progress.Progress":
    from nerfstudio.utils.rich_utils import CONSOLE
    from rich import progress
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return progress.Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=CONSOLE,
    )


@contextmanager
def bar(description: str) -> Iterator[Progress]:
    """A progress bar; the yielded function is called with (done, total)."""
    progress = _progress()
    with progress:
        task = progress.add_task(description, total=None, note="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


class TrainingBar:
    """The bar of the training loop. It opens itself on `update`; other bars need it closed (rich shows one at once)."""

    def __init__(self) -> None:
        self._progress: rich.progress.Progress | None = None

    def update(self, description: str, done: int, total: int, note: str) -> None:
        """Show `done` of `total` steps and a short note (the loss)."""
        if self._progress is None:
            self._progress = _progress()
            self._task = self._progress.add_task(description, total=total, completed=done, note=note)
            self._progress.start()
        self._progress.update(self._task, description=description, completed=done, note=note)

    def close(self) -> None:
        """Leave the bar as it stands and free the console."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def say_expected_time(num_frames: int, num_views: int, steps: int, device: str) -> None:
    """Print about how long the run will take on a CPU, from a short measurement of this machine.

    Nothing is said on CUDA: the official model's time there has not been measured.
    """
    from nerfstudio.utils.rich_utils import CONSOLE

    if device == "cpu":
        minutes = max(round(expected_minutes(num_frames, num_views, steps) / machine_speed()), 1)
        CONSOLE.print(f"This run takes about {minutes} min on this machine ({num_frames} frames, {steps} steps).")


REFERENCE_GFLOPS = 190.0
"""What `machine_speed` measured where the figures of `expected_minutes` come from (2 cores of an AMD EPYC)."""


def expected_minutes(num_frames: int, num_views: int, steps: int) -> float:
    """Minutes of a run with the embedded model on the machine of `REFERENCE_GFLOPS`: start, views twice, fitting."""
    return 0.5 + 0.0008 * num_frames * num_views + 0.00105 * steps


def machine_speed() -> float:
    """Speed of this machine in float32 matrix products, relative to the one of `REFERENCE_GFLOPS`."""
    import torch

    a = torch.rand(768, 768)
    a @ a
    started = time.perf_counter()
    for _ in range(8):
        a @ a
    gflops = 8 * 2 * 768**3 / (time.perf_counter() - started) / 1e9
    return gflops / REFERENCE_GFLOPS
