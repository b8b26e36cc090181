"""Output that any terminal takes."""

import io
import sys


def accept_any_encoding() -> None:
    """Let characters that the terminal's encoding lacks be written as escapes, instead of ending the process.

    Terminals that are not UTF-8 lack most letters, and even one that is cannot show a file name of another encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
