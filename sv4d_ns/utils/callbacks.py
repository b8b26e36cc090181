"""Functions that callers hand down."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total) while a long job goes on."""
