"""The terminal: the one console everything is printed on, and the one progress bar of the project.

The console is nerfstudio's own, so that a bar that is open knows of every line nerfstudio prints, and the other way
round. nerfstudio fixes it at 120 columns; a bar wider than the terminal leaves a line behind at every refresh, so here
it is as wide as the terminal is.

Whoever starts a command and does not read its terminal names a file in the environment (`PROGRESS_VARIABLE`), and finds
there what the open bar shows.
"""

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nerfstudio.utils.rich_utils import CONSOLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from sv4d_ns.utils.files import atomic_path

REFRESHES = 4
"""Of a bar in a second; each takes the training thread's time."""
SLOW_SECONDS = 2.0
"""What takes less needs no bar, where other lines are what a user looks for."""
WIDE, NARROW = 100, 56
"""Columns of the terminal from which a bar shows everything, and below which it shows the least."""
PROGRESS_VARIABLE = "SV4D_PROGRESS"
"""Environment variable that names the file which is to say what the open bar shows (JSON, whole at any moment)."""
REPORT_SECONDS = 0.5
"""At least so long from one writing of that file to the next, while the phase is the same."""


def console() -> Console:
    """nerfstudio's console, as wide as the terminal it writes to."""
    CONSOLE.width = Console(file=CONSOLE.file).width
    return CONSOLE


def say(text: str) -> None:
    """Print sentences, above a bar that is open: broken between words where the terminal ends, paths never."""
    terminal = console()
    if terminal.is_terminal:
        text = "\n".join(
            textwrap.fill(line, terminal.width, break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )
    say_whole(text)


def say_whole(line: str) -> None:
    """Print what is to be copied as it stands, such as a command."""
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float | None) -> str:
    """A duration as 12 s, 3:05 min or 1:02 h; a dash where it is not known."""
    if seconds is None:
        return "-"
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    unit, rest = divmod(whole, 60)
    return f"{unit}:{rest:02d} min" if unit < 60 else f"{unit // 60}:{unit % 60:02d} h"


class _Description(ProgressColumn):
    """What is done; cut short where the terminal is narrow."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class Pace:
    """The time that is left of a phase, from its own steps.

    As soon as there are two, the first is not counted: kernels are compiled in it, and files are opened.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._from = self._last = (0, now())
        self._steps = 0

    def tick(self, done: int) -> None:
        """So much is done."""
        if done <= self._last[0]:
            return
        self._steps += 1
        if self._steps == 2:
            self._from = self._last
        self._last = (done, self._now())

    def left(self, total: int) -> float | None:
        """Seconds; None before the first step."""
        (first, since), (done, at) = self._from, self._last
        if done == first:
            return None
        return max((at - since) / (done - first) * (total - done) - (self._now() - at), 0.0)


class _Remaining(ProgressColumn):
    """The time that is left of the task: what the caller says (`left`), else from its pace."""

    def render(self, task: Task) -> Text:
        if task.finished or task.total is None:
            return Text(clock(task.elapsed), style="progress.elapsed")
        left = task.fields.get("left")
        if left is None and task.fields["pace"] is not None:
            left = task.fields["pace"].left(task.total)
        return Text("" if left is None else f"{clock(left)} left", style="progress.remaining")


class _Report:
    """What the open bar shows, in the file that `PROGRESS_VARIABLE` names; nothing where it names none."""

    def __init__(self) -> None:
        self._phase, self._written = "", 0.0

    def write(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        left: float | None = None,
        run_left: float | None = None,
    ) -> None:
        """Write it, unless that was done a moment ago."""
        file, now = os.environ.get(PROGRESS_VARIABLE), time.monotonic()
        if not file or (phase == self._phase and done < total and now - self._written < REPORT_SECONDS):
            return
        self._phase, self._written = phase, now
        shown = {"phase": phase, "done": done, "total": total, "note": note, "left": left, "run_left": run_left}
        with suppress(OSError), atomic_path(Path(file)) as temporary:  # a full disk must not end the work itself
            temporary.write_text(json.dumps(shown))


_REPORT = _Report()


class Bars(Progress):
    """rich's bars on `console`, with as many columns as fit."""

    def __init__(self, bytes_done: bool = False) -> None:
        # before rich's own, which draws its table once
        self._count: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()] if bytes_done else [MofNCompleteColumn()]
        )
        super().__init__(console=console(), refresh_per_second=REFRESHES)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """rich's own, for the width the terminal has now."""
        self.columns = self._columns(console().width)
        return super().make_tasks_table(tasks)

    def _columns(self, width: int) -> tuple[ProgressColumn, ...]:
        share, left = TaskProgressColumn(), _Remaining()
        if width < NARROW:
            return _Description(), share, left
        note = TextColumn("{task.fields[note]}", markup=False)
        if width < WIDE:
            return _Description(), BarColumn(bar_width=max((width - NARROW) // 2, 4)), share, left, note
        return _Description(), BarColumn(), *self._count, share, left, note

    def add(
        self, description: str, total: int | None, done: int = 0, note: str = "", pace: Pace | None = None
    ) -> TaskID:
        """A new bar that begins at `done` of `total`; without a pace, `left` says how long it takes."""
        return self.add_task(description, total=total, completed=done, note=note, left=None, pace=pace)


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; the yielded function is called with (done, total)."""
    with Bars() as bars:
        pace = Pace()
        task = bars.add(description, None, pace=pace)
        _REPORT.write(description, 0, 0)

        def show(done: int, total: int) -> None:
            pace.tick(done)
            bars.update(task, completed=done, total=total)
            _REPORT.write(description, done, total, left=pace.left(total))

        yield show


@contextmanager
def bar_if_slow(description: str) -> Iterator[Callable[[int, int], None]]:
    """`bar`, shown once the work has taken `SLOW_SECONDS`: most films are through before."""
    with ExitStack() as stack:
        start, opened = time.monotonic(), None

        def show(done: int, total: int) -> None:
            nonlocal opened
            if opened is None and time.monotonic() - start > SLOW_SECONDS:
                opened = stack.enter_context(bar(description))
            if opened is not None:
                opened(done, total)

        yield show


@contextmanager
def bytes_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes; the yielded function is told how many more are done."""
    with Bars(bytes_done=True) as bars:
        pace, done = Pace(), 0
        task = bars.add(description, total, pace=pace)

        def more(count: int) -> None:
            nonlocal done
            done += count
            pace.tick(done)
            bars.update(task, completed=done)

        yield more


class TrainingBar:
    """The bar of the training loop. It opens itself on `update`; other bars need it closed (rich shows one at once)."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._extra = ""

    def update(
        self,
        description: str,
        done: int,
        total: int,
        note: str,
        left: float | None = None,
        run_left: float | None = None,
    ) -> None:
        """Show `done` of `total` steps, a short note (the PSNR) and the seconds left of all; whoever reads the file is
        told those of the phase, too."""
        if self._bars is None:
            self._bars = Bars()
            self._task = self._bars.add(description, total, done, note)
            self._bars.start()
        _REPORT.write(description, done, total, note, left, run_left)
        shown = f"{note} {self._extra}".strip()
        # beside a bar of all steps the phase's time would read as theirs: "0 s left" before stage 2
        self._bars.update(self._task, description=description, completed=done, note=shown, left=run_left)

    def also(self, extra: str) -> None:
        """Show some more behind the note, from the next update on."""
        self._extra = extra

    def close(self) -> None:
        """Leave the bar as it stands and free the console."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
