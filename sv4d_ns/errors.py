"""The one exception users see: a sentence that names the file or flag and the remedy."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence naming the file or flag and what to do about it. Command-line entry points
    print it alone and exit with a non-zero code; library callers catch it like any `ValueError`.
    """
