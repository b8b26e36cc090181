"""The one exception users see: a sentence that names the file or flag and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence naming the file or flag and what to do about it. Command-line entry points
    print it alone and exit with a non-zero code; library callers catch it like any `ValueError`.
    """


class NotFiniteError(ArithmeticError):
    """A term of the loss is NaN or infinite; raised before the step changes anything."""

    def __init__(self, term: str, step: int):
        super().__init__(f"the loss term '{term}' is not finite at step {step}")
        self.term = term
        self.step = step


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """For command-line entry points: end the process with the sentence of an `InputError` and exit code 1."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"Error: {error}") from error
