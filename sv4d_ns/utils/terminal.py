"""Output that any terminal takes, and words of a command line as they are meant."""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def accept_any_encoding() -> None:
    """Let characters that the terminal's encoding lacks be written as escapes, instead of ending the process.

    Terminals that are not UTF-8 lack most letters, and even one that is cannot show a file name of another encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def files_are_no_flags(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `./` before those that begin with a dash and name a file: a parser would take
    them for flags, and say that a value is missing."""
    return [f"./{word}" if word.startswith("-") and len(word) > 2 and os.path.lexists(word) else word for word in words]


def prepare_nerfstudios_command() -> None:
    """What `sv4d` does with its terminal and its words, for nerfstudio's commands: a plugin is loaded before they parse
    their own."""
    accept_any_encoding()
    if Path(sys.argv[0]).name.startswith("ns-"):
        sys.argv[1:] = files_are_no_flags(sys.argv[1:])
