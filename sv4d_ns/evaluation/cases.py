"""Cases with ground truth: rendered animated objects with exact cameras, masks and (where given) geometry.

A case is a folder:

    input.mp4            the input view as a video on white
    cameras.json         "w", "fl_x", "fov_x_deg", "radius", "input_elevation_deg", "times" and "views": each view has
                         "id", "roles", "azimuth_deg", "elevation_deg", "c2w" (4x4, OpenGL) and "frames" (image files)
    geometry.npz         optional: frame_indices (g,), times (g,), points (g, n, 3), normals (g, n, 3), tracks (g, k, 3)

Roles are free words; "input" marks the input view, which is exactly one. Image files are RGBA with straight alpha.
Nothing else is assumed: not the number of views, of frames or of pixels, and no meshes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import resize_rgba
from sv4d_ns.views.grid import ViewGrid

CAMERAS_FILE = "cameras.json"
GEOMETRY_FILE = "geometry.npz"
VIDEO_FILE = "input.mp4"
INPUT_ROLE = "input"


@dataclass(frozen=True, eq=False)
class CaseView:
    """One static camera of a case and its images over time."""

    name: str
    roles: frozenset[str]
    azimuth_deg: float
    """Relative to the input view, counter-clockwise seen from above, degrees."""
    elevation_deg: float
    """Above the horizon, degrees."""
    c2w: Float[np.ndarray, "4 4"]
    """OpenGL camera-to-world."""
    files: tuple[Path, ...]
    """One image for each time of the case."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """True surface samples and tracks at some times of the clip, in the case's world units."""

    times: Float[np.ndarray, " g"]
    """In [0, 1]."""
    frame_indices: tuple[int, ...]
    points: Float[np.ndarray, "g n 3"]
    """Samples of the visible surface, independent in each frame."""
    normals: Float[np.ndarray, "g n 3"]
    """Unit, on the visible side."""
    tracks: Float[np.ndarray, "g k 3"]
    """Surface points followed exactly."""


@dataclass(frozen=True, eq=False)
class Case:
    """A case as described in the module's docstring, images not yet read."""

    name: str
    folder: Path
    size: int
    """Pixels along the side of its images."""
    focal_px: float
    """Focal length at that size; the principal point is the centre."""
    fov_deg: float
    radius: float
    """Distance of the cameras from the origin, world units."""
    input_elevation_deg: float
    times: Float[np.ndarray, " t"]
    views: tuple[CaseView, ...]
    fps: float

    @classmethod
    def load(cls, folder: Path) -> "Case":
        """Read a case's description.

        Raises:
            InputError: naming the first thing that is missing or cannot be used.
        """
        folder = Path(folder)
        path = folder / CAMERAS_FILE
        try:
            description = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{folder} is not a case: it has no {CAMERAS_FILE}.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}): get the case again.") from error
        try:
            times = np.asarray(description["times"], float)
            views = tuple(_view(entry, folder, len(times)) for entry in description["views"])
            width, height = int(description["w"]), int(description["h"])
            case = cls(
                name=folder.resolve().name,
                folder=folder,
                size=width,
                focal_px=float(description["fl_x"]),
                fov_deg=float(description["fov_x_deg"]),
                radius=float(description["radius"]),
                input_elevation_deg=float(description["input_elevation_deg"]),
                times=times,
                views=views,
                fps=float(description.get("fps", 10.0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} lacks or garbles {error}: get the case again.") from error
        if width != height:
            raise InputError(f"{path} describes {width}x{height} images: only square ones are evaluated.")
        if times.ndim != 1 or not len(times) or times.min() < 0 or times.max() > 1 or (np.diff(times) <= 0).any():
            raise InputError(f"{path} must list increasing times in [0, 1].")
        inputs = [view.name for view in views if INPUT_ROLE in view.roles]
        if len(inputs) != 1:
            raise InputError(f'{path} must mark exactly one view with the role "{INPUT_ROLE}", not {len(inputs)}.')
        return case

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.times)

    @property
    def input_view(self) -> CaseView:
        """The view the video shows."""
        return next(view for view in self.views if INPUT_ROLE in view.roles)

    @property
    def video(self) -> Path:
        """The input video; raises `InputError` when the case has none."""
        path = self.folder / VIDEO_FILE
        if not path.is_file():
            raise InputError(f"{self.folder} has no {VIDEO_FILE}: the main job starts from it.")
        return path

    def with_role(self, role: str) -> tuple[CaseView, ...]:
        """Views that have a role, the input view never among them."""
        return tuple(view for view in self.views if role in view.roles and INPUT_ROLE not in view.roles)

    def frames(self, view: CaseView, size: int) -> UInt8[np.ndarray, "t size size 4"]:
        """The images of a view, sRGB with straight alpha, resampled to `size` with premultiplied colours."""
        return resize_rgba(np.stack([_read_rgba(path, self.size) for path in view.files]), size)

    def plan(self, views: tuple[CaseView, ...]) -> ViewPlan:
        """Some views as a plan; raises `InputError` if its cameras are not those of the case."""
        plan = ViewPlan(
            azimuths_deg=tuple(view.azimuth_deg - self.input_view.azimuth_deg for view in views),
            elevations_deg=tuple(view.elevation_deg - self.input_elevation_deg for view in views),
            input_elevation_deg=self.input_elevation_deg,
            radius=self.radius,
            fov_deg=self.fov_deg,
        )
        expected = np.stack([view.c2w for view in (self.input_view, *views)])
        if not np.allclose(plan.c2w(), expected, atol=1e-5) or not np.isclose(
            plan.focal_px(self.size), self.focal_px, rtol=1e-5
        ):
            raise InputError(
                f"The cameras in {self.folder / CAMERAS_FILE} are not those of their azimuths, elevations, radius and "
                "field of view (z up, looking at the origin, azimuth 0 the input view)."
            )
        return plan

    def grid(self, views: tuple[CaseView, ...], size: int) -> ViewGrid:
        """The input view and `views` as the view grid that `ns-train sv4d --data FOLDER` is fitted to.

        Raises:
            InputError: no view, or times that are not evenly spread over [0, 1] (a grid's are).
        """
        if not views:
            raise InputError(f"{self.folder} has no view with the wanted role to make a grid of.")
        if not np.allclose(self.times, np.linspace(0, 1, self.num_frames), atol=1e-6):
            raise InputError(f"The times in {self.folder / CAMERAS_FILE} are not evenly spread over [0, 1].")
        return ViewGrid(
            input_frames=self.frames(self.input_view, size),
            novel_views=np.stack([self.frames(view, size) for view in views], axis=1),
            plan=self.plan(views),
            fps=self.fps,
            provenance={"source": str(self.folder), "views": [view.name for view in views]},
        )

    def geometry(self) -> Geometry | None:
        """Surface samples and tracks, or None if the case has none; raises `InputError` if they are damaged."""
        path = self.folder / GEOMETRY_FILE
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as values:
                arrays = {name: values[name] for name in ("frame_indices", "times", "points", "normals", "tracks")}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} lacks or garbles {error}: get the case again.") from error
        normals = arrays["normals"].astype(np.float64)
        normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
        count = len(arrays["times"])
        shapes_fit = all(
            arrays[name].ndim == 3 and arrays[name].shape[0] == count and arrays[name].shape[2] == 3
            for name in ("points", "normals", "tracks")
        )
        if not shapes_fit or len(arrays["frame_indices"]) != count or arrays["points"].shape != normals.shape:
            raise InputError(f"The arrays in {path} do not belong together: get the case again.")
        return Geometry(
            times=arrays["times"].astype(np.float64),
            frame_indices=tuple(int(index) for index in arrays["frame_indices"]),
            points=arrays["points"].astype(np.float64),
            normals=normals,
            tracks=arrays["tracks"].astype(np.float64),
        )


def find_cases(folder: Path, only: tuple[str, ...] = ()) -> list[Path]:
    """Folders with a cameras.json: `folder` itself, or those in it by name, optionally `only` some.

    Raises:
        InputError: there is none, or one of `only` is missing.
    """
    folder = Path(folder)
    if (folder / CAMERAS_FILE).is_file():
        found = [folder]
    elif folder.is_dir():
        found = sorted(path.parent for path in folder.glob(f"*/{CAMERAS_FILE}"))
    else:
        raise InputError(f"{folder} is not a folder: give a case or a folder of cases.")
    missing = sorted(set(only) - {path.name for path in found})
    if missing:
        raise InputError(f"{folder} has no case {', '.join(missing)}: it holds {', '.join(p.name for p in found)}.")
    chosen = [path for path in found if not only or path.name in only]
    if not chosen:
        raise InputError(f"{folder} holds no case (a folder with {CAMERAS_FILE}).")
    return chosen


def _view(entry: dict[str, Any], folder: Path, num_frames: int) -> CaseView:
    files = tuple(_inside(folder, name) for name in entry["frames"])
    if len(files) != num_frames:
        raise InputError(f"View {entry['id']} in {folder} has {len(files)} images for {num_frames} times.")
    c2w = np.asarray(entry["c2w"], float)
    if c2w.shape != (4, 4):
        raise ValueError(f"c2w of view {entry['id']}")
    return CaseView(
        name=str(entry["id"]),
        roles=frozenset(entry["roles"]),
        azimuth_deg=float(entry["azimuth_deg"]),
        elevation_deg=float(entry["elevation_deg"]),
        c2w=c2w,
        files=files,
    )


def _inside(folder: Path, name: str) -> Path:
    """A file of the case; a description from a stranger must not make anyone read outside its folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder / CAMERAS_FILE} names {name}, which is outside the case.")
    return path


def _read_rgba(path: Path, size: int) -> UInt8[np.ndarray, "size size 4"]:
    try:
        with Image.open(path, formats=("WEBP", "PNG")) as image:
            if image.size != (size, size):
                raise InputError(f"{path} is {image.size[0]}x{image.size[1]}, not the {size}x{size} of the case.")
            return np.array(image.convert("RGBA"))
    except FileNotFoundError as error:
        raise InputError(f"The case lacks {path}: get it again.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is damaged ({error}): get the case again.") from error
