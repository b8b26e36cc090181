"""Looking through a run's config.yml before nerfstudio opens it.

nerfstudio reads config.yml with a loader that builds any Python object, so a config from a stranger can run any
program. This one builds nothing but the settings a run of nerfstudio or this package writes; everything else is refused
by name. Our own commands look first; `ns-viewer`, `ns-eval` and `ns-train --load-config` are nerfstudio's and do not
(docs/usage.md): give them configs you trust.
"""

import dataclasses
import enum
import pathlib
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import FullConstructor

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.moved import MOVED

TRUSTED = ("nerfstudio", "sv4d_ns", "torch.optim")
"""Packages whose classes a config may name."""
FUNCTIONS = frozenset({"nerfstudio.data.utils.nerfstudio_collate.nerfstudio_collate"})
"""Functions nerfstudio's configs name; nothing in a config can choose their arguments."""


def _this_systems_path(loader: yaml.Loader, node: Any) -> Path:
    return Path(*loader.construct_sequence(node))


def open_paths_of_other_systems() -> None:
    """Let configs written on Windows be read elsewhere and vice versa: pathlib cannot make the other system's paths.

    A run lies beside its config.yml wherever that is, so it does not matter that such a path leads nowhere.
    """
    for name in ("pathlib.PosixPath", "pathlib.WindowsPath"):
        for loader in (yaml.Loader, yaml.UnsafeLoader):
            yaml.add_constructor(f"tag:yaml.org,2002:python/object/apply:{name}", _this_systems_path, Loader=loader)


class _Refused(yaml.YAMLError):
    pass


class _SettingsLoader(yaml.UnsafeLoader):
    """nerfstudio's loader, for settings only: classes of trusted packages, and instances of data classes among them."""

    def find_python_module(self, name: str, mark: Any) -> Any:
        raise _Refused(f"the module {name}")

    def find_python_name(self, name: str, mark: Any) -> Any:
        trusted = any(name.startswith(f"{package}.") for package in TRUSTED)
        if not trusted and not name.startswith("pathlib."):
            raise _Refused(name)
        found = FullConstructor.find_python_name(self, name, mark, unsafe=True)
        if name not in FUNCTIONS and not isinstance(found, type):
            raise _Refused(name)
        return found

    def make_python_instance(  # type: ignore[no-untyped-def]
        self, suffix, node, args=None, kwds=None, newobj=False
    ) -> Any:
        found = self.find_python_name(suffix, node.start_mark)
        plain = dataclasses.is_dataclass(found) or (
            isinstance(found, type) and issubclass(found, enum.Enum | pathlib.PurePath)
        )
        if not plain:
            raise _Refused(f"an instance of {suffix}")
        return FullConstructor.make_python_instance(self, suffix, node, args, kwds, newobj, unsafe=True)


def check_config(path: Path) -> None:
    """Make sure that a config holds settings and nothing else, without building what it names.

    Raises:
        InputError: it cannot be read, is no config, or names something a config of a run does not.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the config.yml in the run's folder.") from error
    try:
        config = yaml.load(text, Loader=_SettingsLoader)
    except _Refused as error:
        raise InputError(
            f"{path} names {error}, which no run writes into its config: it may have been made to do harm, and is not "
            "opened; give the config.yml of a run you trust."
        ) from error
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a nerfstudio config.yml: give the one in the run's folder.") from error
    if not dataclasses.is_dataclass(config):
        raise InputError(f"{path} is not a nerfstudio config.yml: give the one in the run's folder.")


class _OutlineLoader(yaml.SafeLoader):
    """Builds no object at all: instances are dicts of their settings, named things their names."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """An instance in a config: its class's name and its settings."""

    name: str
    settings: dict[str, Any]


def _outlined(loader: yaml.SafeLoader, suffix: str, node: Any) -> Any:
    kind, _, name = suffix.partition(":")
    if name and not any(name.startswith(f"{package}.") for package in (*TRUSTED, "pathlib")):
        raise _Refused(name)
    module, _, last = name.rpartition(".")
    name = f"{MOVED.get(module, module)}.{last}"
    if kind == "name":
        return name
    if isinstance(node, yaml.MappingNode):
        return Outline(name, loader.construct_mapping(node, deep=True))
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None


_OutlineLoader.add_multi_constructor("tag:yaml.org,2002:python/", _outlined)


def config_outline(path: Path) -> Outline | None:
    """What a config says, without importing what it names (nerfstudio takes ten seconds to import); None for one that
    `check_config` would not let pass, or that is none."""
    try:
        found = yaml.load(path.read_text(), Loader=_OutlineLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError):
        return None
    return found if isinstance(found, Outline) else None
