"""The one exception users see: a sentence that names the file or flag and the remedy."""

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C, as of every shell."""

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_PERMISSION_ERRORS = frozenset({errno.EACCES, errno.EPERM})
_PATH_ERRORS = frozenset(
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EBUSY, errno.ELOOP, errno.ENAMETOOLONG)
)


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence naming the file or flag and what to do about it. Command-line entry points
    print it alone and exit with a non-zero code; library callers catch it like any `ValueError`.
    """


def install_extra(name: str) -> str:
    """How to get the packages of an extra: this package is on no index, so its name would lead nowhere."""
    return f"pip install '.[{name}]' in the folder that holds this package's pyproject.toml"


class NotFiniteError(ArithmeticError):
    """A term of the loss is NaN or infinite; raised before the step changes anything."""

    def __init__(self, term: str, step: int):
        super().__init__(f"the loss term '{term}' is not finite at step {step}")
        self.term = term
        self.step = step


@contextmanager
def one_sentence_errors(words: Sequence[str] | None = None) -> Iterator[None]:
    """For command-line entry points: end the process with one sentence, and no traceback, where the user can help it.

    An `InputError`, a full or read-only disk, missing permissions, and a path of the command line that is of the wrong
    kind (a file where a folder is to be written) end it with exit code 1; Ctrl-C with 130.

    Args:
        words: those of the command line; None takes the process's.
    """
    try:
        yield
    except InputError as error:
        raise SystemExit(_line(str(error))) from error
    except OSError as error:
        given = _is_given(error, sys.argv[1:] if words is None else words)
        sentence = file_sentence(error) if given else disk_sentence(error)
        if sentence is None:
            raise
        raise SystemExit(_line(sentence)) from error
    except KeyboardInterrupt:
        leave("Stopped. The same command goes on from what is finished.")


def _is_given(error: OSError, words: Sequence[str]) -> bool:
    """Whether an error is about a path that the user named, a folder on the way to it, or something below it as if it
    were a folder; any other is ours."""
    if not isinstance(error.filename, str):
        return False
    place = Path(error.filename)
    given = {Path(part) for word in words for part in (word, word.partition("=")[2]) if part}
    on_the_way = any(place in path.parents for path in given)
    return place in given or on_the_way or any(path in given and not path.is_dir() for path in place.parents)


def _line(sentence: str) -> str:
    """On one line, also where the name of a file is not."""
    return "Error: " + sentence.replace("\r", "\\r").replace("\n", "\\n")


def disk_sentence(error: OSError) -> str | None:
    """What to tell the user of an error of the disk or of permissions; None for any other error."""
    if isinstance(error, shutil.Error):  # several files at once: (source, target, reason) of each
        reasons = [str(reason) for *_, reason in error.args[0]] if error.args else []
        return f"Files cannot be copied ({reasons[0] if reasons else error}): check the disk's space and permissions."
    what = os.fspath(error.filename) if error.filename is not None else "A file"
    if error.errno in _DISK_ERRORS:
        return (
            f"{what!s} cannot be written ({error.strerror}): free some space on the disk, or choose a folder on "
            "another one; the same command goes on from what is finished."
        )
    if error.errno in _PERMISSION_ERRORS:
        return f"{what!s} cannot be opened ({error.strerror}): check the permissions of it and of its folder."
    return None


def file_sentence(error: OSError) -> str | None:
    """`disk_sentence`, and what to say of a path that is missing or of the wrong kind (a folder, not a file)."""
    if error.errno in _PATH_ERRORS:
        what = os.fspath(error.filename) if error.filename is not None else "A file"
        return f"{what!s} cannot be used ({error.strerror}): choose another path."
    return disk_sentence(error)


@contextmanager
def interrupts_handled_by(handler: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `handler` in this block, as often as it is pressed.

    Nothing changes outside the main thread, and where the process was started to ignore it (a shell's background job).
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ours(*_: object) -> None:
        handler()

    before = signal.signal(signal.SIGINT, ours)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is ours:  # `leave` may have put its own in the place
            signal.signal(signal.SIGINT, before)


def leave(sentence: str) -> NoReturn:
    """After an interrupt: say a sentence and end; one more Ctrl-C then ends the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED)
