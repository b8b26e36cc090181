"""What an export shows while it works: progress bars, and a line for each finding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count


class Terminal:
    """Lines and progress bars on the console."""

    def say(self, line: str) -> None:
        """Print a finding."""
        from sv4d_ns.utils.progress import say

        say(line)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; yields the function that counts one."""
        from sv4d_ns.utils.progress import bar

        with bar(what.capitalize()) as show:
            done = count(1)
            show(0, total)
            yield lambda: show(next(done), total)
            show(total, total)
