"""The layout of rendered data, written and read (docs/data.md).

    OUT/dataset.json                                 settings of the render
    OUT/objects/NAME/object.json                     one object: source, licence, cameras, times, measurements
    OUT/objects/NAME/ORBIT.rgba.TT.VV.png            RGBA, straight alpha
    OUT/objects/NAME/ORBIT.depth.TT.VV.png           optional, 16-bit grey
    OUT/objects/NAME/ORBIT.normal.TT.VV.png          optional, 8-bit RGB
    OUT/shards/NNNNNN.tar                            the same files as NAME.object.json, NAME.ORBIT.rgba.TT.VV.png
    OUT/skipped.jsonl                                assets that could not be used, one reason each
    OUT/curation.json                                which objects are kept (`sv4d data curate`)

Shards are ordinary WebDataset tars (the key of a sample is everything before the first dot). They are read at random
positions through an index of their headers, never unpacked: a step's batch then depends on its number alone.
"""

import errno
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sv4d_ns.training_data.orbits import Orbit
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_folder, atomic_path

DATASET_FILE = "dataset.json"
OBJECT_FILE = "object.json"
SKIPPED_FILE = "skipped.jsonl"
CURATION_FILE = "curation.json"
FORMAT = "sv4d-rendered-objects"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ObjectRecord:
    """What `object.json` says of an object.

    Attributes:
        name: letters, digits, - and _ only.
        source: where it comes from (path, Objaverse id or seed, and a hash of the file).
        licence: as stated by the source, or None.
        frames: T.
        size: pixels per side.
        orbits: per orbit the cameras' azimuths and elevations, degrees, absolute.
        fov_deg, distance: of every camera; the distance in units of the object's largest side.
        depth_range: a depth of 65535 in the depth pictures, in the same units.
        background: RGB in [0, 255] behind the object for models without alpha.
        environment: name of the lighting.
        times: moment of each frame in the source's own units.
        measurements: numbers taken while rendering (see docs/data.md); absent where unknown.
    """

    name: str
    source: dict[str, Any]
    licence: str | None
    frames: int
    size: int
    orbits: dict[str, dict[str, list[float]]]
    fov_deg: float
    distance: float
    depth_range: float
    background: list[int]
    environment: str
    times: list[float]
    measurements: dict[str, float]

    @property
    def views(self) -> int:
        """V, the number of cameras of an orbit."""
        return len(next(iter(self.orbits.values()))["azimuths_deg"])

    def cameras(self, orbit: Orbit) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
        """Absolute azimuths and elevations of an orbit, degrees."""
        angles = self.orbits[orbit.value]
        return np.array(angles["azimuths_deg"]), np.array(angles["elevations_deg"])

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "ObjectRecord":
        """Raises InputError for anything else than such a record."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{where} does not describe a rendered object ({error}): delete the object's files and render it again."
            ) from error


def picture_name(orbit: Orbit, frame: int, view: int, kind: str = "rgba") -> str:
    """File name of a picture; `kind` is rgba, depth or normal."""
    return f"{orbit.value}.{kind}.{frame:02d}.{view:02d}.png"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk is one sentence; what was written before stays."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch tells of a short write by the place it came to
        of_torch = isinstance(error, RuntimeError) and "unexpected pos" in str(error)
        if not of_torch and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"The disk is full while writing {path}: free some space and give the same command again; everything "
            "finished so far is kept."
        ) from error


def write_object(folder: Path, record: ObjectRecord, pictures: Iterator[tuple[str, bytes]]) -> None:
    """Write an object so that its folder is either complete or absent.

    Args:
        folder: OUT/objects/NAME.
        record: its description.
        pictures: (file name, PNG bytes).
    """
    with disk_errors(folder), atomic_folder(folder, OBJECT_FILE, "a rendered object") as temporary:
        for name, content in pictures:
            (temporary / name).write_bytes(content)
        (temporary / OBJECT_FILE).write_text(json.dumps(record.__dict__, indent=1))


def png(picture: np.ndarray) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def write_shard(path: Path, folders: list[Path]) -> None:
    """Pack finished object folders into one tar, whole or not at all."""
    with disk_errors(path), atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
        for folder in folders:
            # the description first: a reader then knows what follows
            names = sorted(folder.iterdir(), key=lambda file: (file.name != OBJECT_FILE, file.name))
            for file in names:
                tar.add(file, arcname=f"{folder.name}.{file.name}", filter=_plain)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that equal content makes equal shards."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime, info.mode = 0, 0o644
    return info


@dataclass(frozen=True)
class _Member:
    """Where a file's bytes are: a whole file, or a piece of a shard."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


class RenderedDataset:
    """A folder made by `sv4d data render`, read at random positions.

    Args:
        path: the folder.
        curated: leave out what `sv4d data curate` dropped, where it has been run.

    Raises:
        InputError: when the folder is not one, is damaged, or holds no object.
    """

    def __init__(self, path: Path, curated: bool = True):
        self.path = Path(path)
        if not (self.path / DATASET_FILE).is_file():
            raise InputError(
                f"{self.path} holds no rendered data (no {DATASET_FILE}): make it with 'sv4d data render SOURCE "
                f"{self.path}'."
            )
        self._members = self._index()
        dropped = self._dropped() if curated else set()
        names = sorted(name for name, files in self._members.items() if OBJECT_FILE in files and name not in dropped)
        if not names:
            left = f"none of its {len(self._members)} objects is kept by {CURATION_FILE}" if dropped else "no object"
            raise InputError(f"{self.path} has nothing to read ({left}): render more, or curate with other thresholds.")
        self.records = [
            ObjectRecord.from_json(self._members[name][OBJECT_FILE].read(), f"{self.path}: {name}") for name in names
        ]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def pictures(
        self, record: ObjectRecord, orbit: Orbit, frames: list[int], views: list[int]
    ) -> UInt8[np.ndarray, "t v h w 4"]:
        """RGBA pictures (straight alpha) of an object at some frames from some views.

        Raises:
            InputError: when a picture is missing or damaged.
        """
        rows = [[self._picture(record, picture_name(orbit, t, v)) for v in views] for t in frames]
        return np.stack([np.stack(row) for row in rows])

    def _picture(self, record: ObjectRecord, name: str) -> UInt8[np.ndarray, "h w 4"]:
        member = self._members[record.name].get(name)
        try:
            if member is None:
                raise OSError("it is missing")
            with Image.open(io.BytesIO(member.read())) as opened:
                return np.asarray(opened.convert("RGBA"))
        except (OSError, SyntaxError) as error:
            raise InputError(
                f"The picture {name} of '{record.name}' in {self.path} cannot be read ({error}): delete the object "
                "(or its shard) and render it again."
            ) from error

    def _index(self) -> dict[str, dict[str, _Member]]:
        members: dict[str, dict[str, _Member]] = {}
        for folder in sorted((self.path / "objects").glob("[!.]*")):
            members[folder.name] = {file.name: _Member(file) for file in folder.iterdir()}
        for shard in sorted((self.path / "shards").glob("[!.]*.tar")):
            try:
                with tarfile.open(shard) as tar:
                    for info in tar:
                        name, _, file = info.name.partition(".")
                        members.setdefault(name, {})[file] = _Member(shard, info.offset_data, info.size)
            except tarfile.TarError as error:
                raise InputError(f"The shard {shard} is damaged ({error}): delete it and render again.") from error
        return members

    def _dropped(self) -> set[str]:
        path = self.path / CURATION_FILE
        if not path.is_file():
            return set()
        try:
            return {entry["name"] for entry in json.loads(path.read_text())["dropped"]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): run 'sv4d data curate {self.path}' again.") from error


def finished_names(path: Path) -> set[str]:
    """Objects that are complete in a folder, loose or in shards."""
    names = {folder.name for folder in (path / "objects").glob("[!.]*") if (folder / OBJECT_FILE).is_file()}
    for shard in (path / "shards").glob("[!.]*.tar"):
        with tarfile.open(shard) as tar:
            names |= {info.name.partition(".")[0] for info in tar if info.name.endswith(OBJECT_FILE)}
    return names


def composited(pictures: UInt8[np.ndarray, "... 4"], background: list[int]) -> UInt8[np.ndarray, "... 3"]:
    """Straight-alpha pictures over a plain colour."""
    alpha = pictures[..., 3:].astype(np.float32) / 255.0
    colour = pictures[..., :3] * alpha + np.array(background, dtype=np.float32) * (1.0 - alpha)
    return (colour + 0.5).astype(np.uint8)
