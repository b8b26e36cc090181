"""Numbers of a command's settings, looked at before anything is read or written."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sv4d_ns.utils.errors import InputError


@dataclass(frozen=True)
class Range:
    """What a number may be."""

    allows: Callable[[float], bool]
    wanted: str
    """What to give, for the message."""


SHARE = Range(lambda value: 0 <= value <= 1, "a value from 0 to 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "a value from 0 to below 1")
POSITIVE = Range(lambda value: value > 0, "a value above 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
AT_LEAST_ONE = Range(lambda value: value >= 1, "at least 1")


def check_numbers(settings: object, limits: Range, *names: str) -> None:
    """Look at the fields of these names.

    Raises:
        InputError: one is not what `limits` allows, or not finite; the sentence names its flag.
    """
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and limits.allows(value)):
            raise InputError(f"--{name.replace('_', '-')} is {value}: give {limits.wanted}.")
