"""Recipe files: settings of a training run as YAML, with the kind of model they are for."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from sv4d_ns.utils.errors import InputError

KINDS = ("sv4d", "bundled")


def read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """The kind of model a recipe is for, and its settings.

    Raises:
        InputError: the file cannot be read, or says no known kind.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict) or values.get("model") not in KINDS:
        raise InputError(f"--config {path} must say 'model: {KINDS[0]}' or 'model: {KINDS[1]}' beside its settings.")
    kind = values.pop("model")
    return kind, values


def with_settings(config: Any, values: dict[str, Any], path: str) -> Any:
    """A settings dataclass with a recipe's values, brought to the types of the defaults they replace.

    Raises:
        InputError: a value is of no known setting or of another type.
    """
    known = {field.name for field in fields(config)}
    for name in values:
        if name not in known:
            raise InputError(f"--config {path} names '{name}', which is no setting of this model.")
    return replace(config, **{name: _like(getattr(config, name), value, name, path) for name, value in values.items()})


def _like(default: Any, value: Any, name: str, path: str) -> Any:
    if isinstance(default, Path) and isinstance(value, str):
        return Path(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not None and type(value) is not type(default):
        raise InputError(f"--config {path} gives '{name}' as {value!r}, but it is of the kind of {default!r}.")
    return value
