"""Processes that start others."""

import ctypes
import os
import signal
import sys


def end_with_the_parent() -> None:
    """Let the system end this process when the one that started it is gone (Linux)."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit(1)
