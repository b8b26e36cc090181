"""The help of `ns-train sv4d`: the dozen settings a user needs. `ns-train sv4d --help all` lists every one.

tyro builds the help from the annotations of the configurations. While help is asked for, and only then, those of the
rarer settings are marked as suppressed: in a command that trains they are settings like all others.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

METHODS = ("sv4d", "4diffusion")
ALL = "all"
Config = TypeVar("Config", bound=type)


def asked_help(arguments: Sequence[str] | None = None) -> Literal["none", "short", "all"]:
    """Which help of one of our methods a command line asks for; None takes this process's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    place = min((words.index(word) for word in ("-h", "--help") if word in words), default=None)
    if place is None or not any(method in words[:place] for method in METHODS):
        return "none"
    return "all" if words[place + 1 :] == [ALL] else "short"


def first_in_help(*names: str) -> Callable[[Config], Config]:
    """Class decorator of a configuration: the short help shows these of its fields, and what is below them."""

    def mark(config: Config) -> Config:
        unknown = set(names) - set(config.__dataclass_fields__)  # type: ignore[attr-defined]
        assert not unknown, f"{config.__name__} has no {unknown}"
        help_asked = asked_help()
        if help_asked == "short":
            _suppress(config, [name for name in config.__dataclass_fields__ if name not in names])  # type: ignore[attr-defined]
        elif help_asked == "all":
            # a group for every group of parameters, twice: their one useful setting is named in the description
            _suppress(config, [name for name in ("optimizers",) if name in config.__dataclass_fields__])  # type: ignore[attr-defined]
        return config

    return mark


def without_flags(*names: str) -> Callable[[Config], Config]:
    """Class decorator of a configuration: these inherited fields, which nothing reads, are no flags. They stay
    attributes, which nerfstudio's commands may set."""

    def mark(config: Config) -> Config:
        _annotate(config, names, tyro.conf.Fixed, tyro.conf.Suppress)
        return config

    return mark


def _suppress(config: Any, names: Sequence[str]) -> None:
    _annotate(config, names, tyro.conf.Suppress)


def _annotate(config: Any, names: Sequence[str], *markers: Any) -> None:
    """Mark fields for tyro, whose markers are generics to type checkers and so would want a type's name here."""
    hints = get_type_hints(config, include_extras=True)
    for name in names:
        for marker in markers:
            hints[name] = marker[hints[name]]
    config.__annotations__ = {
        **vars(config).get("__annotations__", {}),
        **{name: hints[name] for name in names},
    }


def described(method: str, description: str, groups: Sequence[str]) -> str:
    """A method's description, with what its help leaves out."""
    help_asked = asked_help()
    if help_asked == "short":
        return f"{description} These are the settings most runs need: 'ns-train {method} --help {ALL}' lists every one."
    if help_asked == "all":
        rates = ", ".join(groups)
        return f"{description} Learning rates are --optimizers.GROUP.optimizer.lr; GROUP is one of {rates}."
    return description
