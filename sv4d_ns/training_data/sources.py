"""What there is to render: a folder of assets, Objaverse ids, or procedural creatures."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sv4d_ns.training_data.exclusions import is_test_object
from sv4d_ns.training_data.procedural import TRAINING_SEEDS
from sv4d_ns.utils.errors import InputError, install_extra

SUFFIXES = (".glb", ".gltf", ".fbx", ".blend")
PROCEDURAL = "procedural:"
OBJAVERSE = "objaverse:"
PROCEDURAL_LICENCE = "CC0-1.0"
OBJAVERSE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Asset:
    """One thing to render.

    Attributes:
        name: of the rendered object; letters, digits, - and _ only.
        path: the asset's file, or None for a creature.
        seed: the creature's seed, or None.
        licence: as its source states it, or None.
        source: recorded with the rendered object.
        clip: number of the file's animation, or None: the first, or whatever Blender plays.
    """

    name: str
    path: Path | None
    seed: int | None
    licence: str | None
    source: dict[str, Any]
    clip: int | None = None


def list_assets(source: str, licence: str | None, include_test_objects: bool) -> tuple[list[Asset], list[str]]:
    """The assets of a SOURCE, and the names of those left out because published evaluations use them.

    Raises:
        InputError: when the source cannot be read or holds nothing.
    """
    if source.startswith(PROCEDURAL):
        assets = _creatures(source)
    elif source.startswith(OBJAVERSE):
        assets = _objaverse(source.removeprefix(OBJAVERSE), include_test_objects)
    else:
        assets = _folder(Path(source), licence)
    held_out = [] if include_test_objects else [asset.name for asset in assets if is_test_object(asset.name)]
    return [asset for asset in assets if asset.name not in set(held_out)], held_out


def slug(text: str) -> str:
    """A name that every file system and WebDataset take: other characters become a dash."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "asset"


def _creatures(source: str) -> list[Asset]:
    match = re.fullmatch(r"procedural:(\d+):(\d+)", source)
    if match is None or int(match[2]) < 1:
        raise InputError(f"'{source}' names no creatures: write procedural:SEED:COUNT, for example procedural:0:100.")
    first, count = int(match[1]), int(match[2])
    if first + count > TRAINING_SEEDS.stop:
        raise InputError(
            f"'{source}' reaches creatures that are held out for evaluations: the largest seed for training is "
            f"{TRAINING_SEEDS.stop - 1}, so take an earlier SEED or a smaller COUNT."
        )
    return [
        Asset(f"creature-{seed:010d}", None, seed, PROCEDURAL_LICENCE, {"kind": "procedural", "seed": seed})
        for seed in range(first, first + count)
    ]


def _folder(folder: Path, licence: str | None) -> list[Asset]:
    if not folder.exists():
        raise InputError(
            f"The source {folder} does not exist: give a folder of assets, procedural:SEED:COUNT, or "
            "objaverse:FILE_OR_IDS."
        )
    if not folder.is_dir():
        raise InputError(f"The source {folder} is a file: give the folder that holds the assets.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"The folder {folder} holds no asset ({', '.join(SUFFIXES)}): give another one.")
    assets, seen = [], set()
    for path in files:
        name = slug(str(path.relative_to(folder).with_suffix("")))
        if name in seen:  # a.glb beside a.fbx, or names that differ in odd characters
            name = slug(str(path.relative_to(folder)))
        number = 2
        while name in seen:
            name, number = f"{slug(str(path.relative_to(folder)))}-{number}", number + 1
        seen.add(name)
        stated = _stated_licence(path) or licence
        assets.append(Asset(name, path, None, stated, {"kind": "file", "path": str(path)}))
    return assets


def _stated_licence(path: Path) -> str | None:
    """The licence in NAME.json beside an asset (key `license` or `licence`), as asset sites write it."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return None
    try:
        values = json.loads(sidecar.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{sidecar} beside {path.name} is not JSON ({error}): repair or remove it.") from error
    stated = values.get("license", values.get("licence")) if isinstance(values, dict) else None
    return str(stated) if stated else None


def read_ids(text: str) -> list[str]:
    """Objaverse ids from a comma-separated list or a file (text, CSV, JSON) that names them.

    Raises:
        InputError: when there is none.
    """
    path = Path(text)
    content = path.read_text() if path.is_file() else text
    ids = list(dict.fromkeys(OBJAVERSE_ID.findall(content.lower())))
    if not ids:
        raise InputError(
            f"'objaverse:{text}' holds no Objaverse id (32 hexadecimal digits): give a file that lists some, or ids "
            "separated by commas."
        )
    return ids


def _objaverse(text: str, include_test_objects: bool) -> list[Asset]:
    ids = [uid for uid in read_ids(text) if include_test_objects or not is_test_object(uid)]
    held_out = [uid for uid in read_ids(text) if uid not in set(ids)]
    try:
        import objaverse
    except ImportError as error:
        raise InputError(
            f"Objaverse assets need the objaverse package: {install_extra('objaverse')}, or download the assets "
            "yourself and give their folder."
        ) from error
    try:
        annotations = objaverse.load_annotations(ids) if ids else {}
        files = objaverse.load_objects(ids) if ids else {}
    except Exception as error:  # urllib's, the hub's and the package's own, whichever fails first
        raise InputError(
            f"Objaverse cannot be reached ({' '.join(str(error).split()) or type(error).__name__}): connect to the "
            "network, or give a folder of assets that are on disk."
        ) from error
    assets = [
        Asset(uid, Path(files[uid]), None, annotations.get(uid, {}).get("license"), {"kind": "objaverse", "uid": uid})
        for uid in ids
        if uid in files
    ]
    # named so that the caller can say they were left out; never downloaded
    assets += [Asset(uid, None, None, None, {"kind": "objaverse", "uid": uid}) for uid in held_out]
    if not assets:
        raise InputError(f"None of the {len(ids)} ids of 'objaverse:{text}' could be fetched: check the ids.")
    return assets


def check_names(assets: Sequence[Asset]) -> None:
    """Raise InputError for two assets of one name, which would overwrite each other."""
    names = [asset.name for asset in assets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Two assets are called '{twice[0]}': rename one of them.")
