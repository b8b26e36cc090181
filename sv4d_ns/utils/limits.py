"""Values of a command's settings, looked at before anything is read or written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sv4d_ns.utils.errors import InputError


@dataclass(frozen=True)
class Range:
    """What a value may be."""

    allows: Callable[[Any], bool]
    wanted: str
    """What to give, for the message."""


SHARE = Range(lambda value: 0 <= value <= 1, "a value from 0 to 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "a value from 0 to below 1")
POSITIVE = Range(lambda value: value > 0, "a value above 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
AT_LEAST_ONE = Range(lambda value: value >= 1, "at least 1")


def between(low: float, high: float, wanted: str) -> Range:
    """Numbers from `low` to `high`."""
    return Range(lambda value: low <= value <= high, wanted)


def check_value(flag: str, value: Any, limits: Range) -> None:
    """Raises `InputError` that names the flag (without its dashes) if the value is not what `limits` allows, or a
    number that is not finite."""
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or not limits.allows(value):
        raise InputError(f"--{flag} is {value!r}: give {limits.wanted}.")


def check_numbers(settings: object, limits: Range, *names: str) -> None:
    """Look at the fields of these names.

    Raises:
        InputError: one is not what `limits` allows, or not finite; the sentence names its flag.
    """
    for name in names:
        check_value(name.replace("_", "-"), getattr(settings, name), limits)
