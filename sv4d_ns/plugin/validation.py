"""What a setting of a run may be, looked at before anything is read or written.

nerfstudio's command line checks types only: a size of 0 would end in a division by zero minutes later.
"""

import dataclasses
import math
import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from sv4d_ns.runs.layout import MAX_REFINE_ROUNDS
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.limits import Range, between, check_value


def _is_name(value: str) -> bool:
    path = PurePath(value)
    return bool(value.strip()) and not path.is_absolute() and ".." not in path.parts


def _are_rounds(value: tuple[int, ...]) -> bool:
    ascending = list(value) == sorted(set(value))
    return ascending and min(value, default=1) >= 1 and len(value) <= MAX_REFINE_ROUNDS


_SEEDS = 2**32 - 1
_DATAMANAGER = "pipeline.datamanager."

LIMITS: tuple[tuple[str, Range], ...] = (
    ("experiment-name", Range(_is_name, "a name for a folder, without '..'")),
    ("timestamp", Range(_is_name, "a name for a folder, without '..'")),
    ("max-num-iterations", between(0, 10**8, "1 step or more, or 0 for the usual number")),
    ("steps-per-save", between(0, 10**8, "the steps between checkpoints, or 0 for one at the end only")),
    ("machine.num-devices", between(1, 1, "1: a run uses one device")),
    ("machine.num-machines", between(1, 1, "1: a run uses one machine")),
    ("machine.seed", between(0, _SEEDS, f"a number from 0 to {_SEEDS}")),
    (_DATAMANAGER + "seed", between(0, _SEEDS, f"a number from 0 to {_SEEDS}")),
    (_DATAMANAGER + "max-frames", between(1, 10**6, "1 frame or more")),
    (_DATAMANAGER + "fps", Range(lambda value: value > 0, "a rate above 0")),
    (_DATAMANAGER + "frame-ratio", Range(lambda value: 0 < value <= 1, "a share above 0 and at most 1")),
    (_DATAMANAGER + "input-size", between(16, 2048, "16 to 2048 pixels")),
    (_DATAMANAGER + "synthesis-steps", between(1, 1000, "1 to 1000 denoising steps")),
    (_DATAMANAGER + "guidance-scale", between(0, 100, "a scale from 0 to 100")),
    (_DATAMANAGER + "train-num-rays-per-batch", between(1, 2**20, f"1 to {2**20} rays")),
    (_DATAMANAGER + "patches", between(0, 1024, "0 to 1024 patches")),
    ("pipeline.visibility-every", between(0, 10**8, "a number of steps, or 0 for never")),
    (
        "pipeline.refine-steps",
        Range(
            _are_rounds,
            f"at most {MAX_REFINE_ROUNDS} steps above 0, each later than the one before, or none for stage 1 alone",
        ),
    ),
    ("pipeline.refine-strength", Range(lambda value: 0 < value <= 1, "a share above 0 and at most 1")),
    (
        "pipeline.movie-size",
        Range(lambda value: 16 <= value <= 4096 and value % 2 == 0, "an even size, 16 to 4096 pixels"),
    ),
)
"""What each setting may be, by its flag without the leading dashes."""


def check_settings(config: Any) -> None:
    """Look at the settings of a run (a trainer's configuration).

    Raises:
        InputError: naming the first flag whose value no run can have.
    """
    for flag, limits in LIMITS:
        value = _value(config, flag)
        if value is not None:
            check_value(flag, value, limits)
    check_service(str(_value(config, "vis")))
    late = [step for step in _value(config, "pipeline.refine-steps") or () if step >= config.max_num_iterations]
    if late:
        raise InputError(
            f"--pipeline.refine-steps {late[0]} is not within the run's {config.max_num_iterations} steps, so stage 2 "
            "would never come: give an earlier step, more steps (--max-num-iterations), or none for stage 1 alone."
        )
    for flag in _not_numbers(config, ""):
        raise InputError(f"--{flag} is not a number (nan): give one.")


def check_service(vis: str) -> None:
    """Whether a service that keeps the curves of runs (--vis) can be used: nerfstudio ends in a traceback otherwise.

    Raises:
        InputError: it is not installed, or has no key.
    """
    remedy = "or leave out --vis; tensorboard needs neither account nor key."
    if "wandb" in vis and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        if find_spec("wandb") is None:
            raise InputError(f"--vis {vis} needs wandb (pip install wandb), {remedy}")
        if not _has_wandb_key():
            raise InputError(
                f"--vis {vis} needs a key of Weights & Biases: run 'wandb login' (or set WANDB_API_KEY), or set "
                f"WANDB_MODE=offline, {remedy}"
            )
    if "comet" in vis:
        if find_spec("comet_ml") is None:
            raise InputError(f"--vis {vis} needs comet_ml (pip install comet_ml), {remedy}")
        import comet_ml

        if not comet_ml.get_config("comet.api_key"):
            raise InputError(f"--vis {vis} needs a key of Comet: set COMET_API_KEY (or run 'comet login'), {remedy}")


def _has_wandb_key() -> bool:
    """In the environment, or where 'wandb login' puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    return False


def _value(config: Any, flag: str) -> Any:
    """Of a flag; None where it is not set or the method has none of its name."""
    for part in flag.replace("-", "_").split("."):
        config = getattr(config, part, None)
    return config


def _not_numbers(value: Any, flag: str) -> Iterator[str]:
    """Flags of all settings that are nan."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _not_numbers(part, f"{flag}.{name}".lstrip(".").replace("_", "-"))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _not_numbers(part, flag)
    elif isinstance(value, float) and math.isnan(value):
        yield flag
