"""Functions compiled by numba, their machine code kept on the disk where there is a place for it."""

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit`, which with `cache=True` still works where nothing can be kept.

    numba keeps compiled code beside the source, else below the user's home, and ends the import of the module where it
    may write to neither: an installation that is read-only, used by somebody without a home, as in a container that
    runs under any user's number. Then the function is compiled anew in each process.
    """

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(**options)(function)
        except RuntimeError as error:
            if not options.get("cache") or "cannot cache" not in str(error):
                raise
            return numba.njit(**{**options, "cache": False})(function)

    return compiled
