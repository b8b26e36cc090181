"""The grid of views on disk: the contract between synthesis and optimisation.

A saved grid is a folder that other tools can read as a plain nerfstudio dataset:

    transforms.json                   nerfstudio frames with their own intrinsics, `time` and `transform_matrix`
    grid.json                         what this package needs to re-open the grid exactly
    images/viewVV_frameTTT.png        RGBA, 8 bit, sRGB, straight alpha; view 00 is the input video
    confidence/viewVV_frameTTT.png    optional, 8-bit grey, novel views only

File names follow from the shape alone, so a grid from a stranger can make nobody read a file outside its folder.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_folder, content_hash

GRID_FILE = "grid.json"
TRANSFORMS_FILE = "transforms.json"
FORMAT = "sv4d-view-grid"
FORMAT_VERSION = 1

LARGEST = 16384
"""Frames, and pixels along a side, that a grid holds at most."""

PNG_COMPRESSION = 3
"""zlib level: twice as fast as PIL's default for files about 5 % larger (own choice; a grid is written often)."""


@dataclass(frozen=True, eq=False)
class ViewGrid:
    """T frames of the input view and of V novel views, with their cameras.

    Images are uint8, sRGB, straight alpha. The novel views may have another resolution than the input. Raises
    `InputError` on construction when the arrays do not belong together, hold no frame, are not square (the shared
    camera is), or show no object at all.
    """

    input_frames: UInt8[np.ndarray, "t H W 4"]
    novel_views: UInt8[np.ndarray, "t v h w 4"]
    plan: ViewPlan
    fps: float
    confidence: UInt8[np.ndarray, "t v h w"] | None = None
    """How far each novel pixel is to be believed: 0 not at all, 255 like the input video; None where unknown."""
    framing: dict[str, Any] | None = None
    """The square crop that made the input frames from the source video (`Framing.to_dict`); None where unknown."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the views come from (model, weights, seed, steps, settings); JSON values. Not part of `content_id`."""

    def __post_init__(self) -> None:
        _check_images("input_frames", self.input_frames, dimensions=4)
        _check_images("novel_views", self.novel_views, dimensions=5)
        if self.novel_views.shape[0] != self.num_frames:
            raise InputError(
                f"The view grid has {self.num_frames} input frames but {self.novel_views.shape[0]} frames of novel "
                "views: give as many of each."
            )
        if self.novel_views.shape[1] != self.plan.num_views:
            raise InputError(
                f"The view grid has {self.novel_views.shape[1]} novel views but its plan has {self.plan.num_views}: "
                "give one image for each view of the plan."
            )
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"The view grid's frame rate {self.fps} is not a positive number of frames per second.")
        if self.confidence is not None and (
            self.confidence.dtype != np.uint8 or self.confidence.shape != self.novel_views.shape[:-1]
        ):
            raise InputError("The view grid's confidence must be one 8-bit value for each pixel of the novel views.")

    @property
    def num_frames(self) -> int:
        """T."""
        return self.input_frames.shape[0]

    @property
    def num_views(self) -> int:
        """V, the novel views; the input view is not counted."""
        return self.novel_views.shape[1]

    @property
    def times(self) -> Float[np.ndarray, " t"]:
        """Time of each frame in [0, 1]: frame i of T at i / (T - 1), and 0 for a single frame."""
        return np.linspace(0.0, 1.0, self.num_frames)

    @property
    def content_id(self) -> str:
        """Hash of everything but the provenance: two grids with the same pixels and cameras have the same one."""
        arrays = [self.input_frames, self.novel_views]
        if self.confidence is not None:
            arrays.append(self.confidence)
        return content_hash(FORMAT_VERSION, self.plan.to_dict(), float(self.fps), self.framing, *arrays)

    def save(self, folder: Path) -> Path:
        """Write the grid to `folder`, whole or not at all; an older grid there is replaced.

        Returns `folder`. Raises `InputError` if `folder` holds something that is not a grid (it is left untouched)
        or cannot be written.
        """
        folder = Path(folder)
        description = self._describe()
        transforms = _transforms(self.plan, self.num_frames, self.input_frames.shape[1], self.novel_views.shape[2])
        try:
            with atomic_folder(folder, GRID_FILE, "a view grid") as temporary:
                for kind, view, frame, image in self._images():
                    path = temporary / image_name(kind, view, frame)
                    path.parent.mkdir(exist_ok=True)
                    Image.fromarray(image).save(path, compress_level=PNG_COMPRESSION)
                (temporary / TRANSFORMS_FILE).write_text(json.dumps(transforms, indent=2))
                (temporary / GRID_FILE).write_text(json.dumps(description, indent=2))
        except OSError as error:
            raise InputError(
                f"The views cannot be written to {folder} ({error.strerror or error}): "
                "choose a writable folder on a disk with free space."
            ) from error
        return folder

    @classmethod
    def load(cls, folder: Path) -> "ViewGrid":
        """Re-open a saved grid; raises `InputError` naming the first thing that is missing, damaged or changed."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give the folder of a view grid (it holds {GRID_FILE}).")
        description = _read_json(folder / GRID_FILE)
        try:
            if (description["format"], description["version"]) != (FORMAT, FORMAT_VERSION):
                raise InputError(
                    f"{folder / GRID_FILE} is of another format ({description['format']} {description['version']}): "
                    f"this version reads {FORMAT} {FORMAT_VERSION}; make the views again."
                )
            plan = _read_plan(description["plan"], folder / GRID_FILE)
            num_frames, input_size, view_size = (
                _positive_integer(description, name, folder) for name in ("num_frames", "input_size", "view_size")
            )
            fps, framing, provenance = float(description["fps"]), description["framing"], description["provenance"]
            has_confidence, content_id = bool(description["confidence"]), description["content_id"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder / GRID_FILE} lacks or garbles {error}: make the views again.") from error
        # before anything of the promised number is built: a forged one could ask for memory without end
        last = folder / image_name("images", plan.num_views, num_frames - 1)
        if not last.is_file():
            raise InputError(f"The view grid lacks {last}: make the views again.")
        _check_transforms(folder / TRANSFORMS_FILE, _transforms(plan, num_frames, input_size, view_size))

        def read(kind: str, view: int, size: int, mode: str) -> list[np.ndarray]:
            return [_read_image(folder / image_name(kind, view, t), size, mode) for t in range(num_frames)]

        novel = range(1, plan.num_views + 1)
        grid = cls(
            input_frames=np.stack(read("images", 0, input_size, "RGBA")),
            novel_views=np.stack([read("images", view, view_size, "RGBA") for view in novel], axis=1),
            plan=plan,
            fps=fps,
            confidence=(
                np.stack([read("confidence", view, view_size, "L") for view in novel], axis=1)
                if has_confidence
                else None
            ),
            framing=framing,
            provenance=provenance,
        )
        if grid.content_id != content_id:
            raise InputError(
                f"The images in {folder} were changed after {GRID_FILE} was written: make the views again."
            )
        return grid

    def _describe(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "content_id": self.content_id,
            "plan": self.plan.to_dict(),
            "fps": float(self.fps),
            "num_frames": self.num_frames,
            "num_views": self.num_views,
            "input_size": self.input_frames.shape[1],
            "view_size": self.novel_views.shape[2],
            "confidence": self.confidence is not None,
            "framing": self.framing,
            "provenance": self.provenance,
        }

    def _images(self) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """Every picture of the grid as (kind, view, frame, pixels)."""
        for frame in range(self.num_frames):
            yield "images", 0, frame, self.input_frames[frame]
            for view in range(self.num_views):
                yield "images", view + 1, frame, self.novel_views[frame, view]
                if self.confidence is not None:
                    yield "confidence", view + 1, frame, self.confidence[frame, view]


def _check_images(name: str, images: np.ndarray, dimensions: int) -> None:
    if images.dtype == object:
        raise InputError(f"The view grid's {name} has pictures of different sizes: resize them to one size.")
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        raise InputError(
            f"The view grid's {name} holds values that are not finite (NaN): give 8-bit RGBA pictures without them."
        )
    if images.dtype != np.uint8 or images.ndim != dimensions or images.shape[-1] != 4:
        raise InputError(
            f"The view grid's {name} must be 8-bit RGBA pictures, not {images.dtype} of shape {images.shape}."
        )
    if images.size == 0:
        raise InputError(f"The view grid's {name} is empty: give at least one frame of at least one pixel.")
    if images.shape[-3] != images.shape[-2]:
        raise InputError(f"The view grid's {name} is {images.shape[-2]}x{images.shape[-3]}: give square pictures.")
    if not images[..., 3].any():
        raise InputError(f"The view grid's {name} is fully transparent: there is no object to be seen.")


def image_name(kind: str, view: int, frame: int) -> str:
    """Place of one picture inside a grid's folder; kind is "images" or "confidence", view 0 the input."""
    # Base names are unique over all views: nerfstudio looks for down-scaled copies by base name alone.
    return f"{kind}/view{view:02d}_frame{frame:04d}.png"


def _transforms(plan: ViewPlan, num_frames: int, input_size: int, view_size: int) -> dict[str, Any]:
    """The nerfstudio description. Intrinsics stand in each frame because the two resolutions may differ."""
    frames = []
    for view, c2w in enumerate(plan.c2w()):
        size = input_size if view == 0 else view_size
        intrinsics = {"fl_x": plan.focal_px(size), "fl_y": plan.focal_px(size), "cx": size / 2, "cy": size / 2}
        for frame in range(num_frames):
            frames.append(
                {
                    "file_path": image_name("images", view, frame),
                    "time": frame / max(num_frames - 1, 1),
                    "w": size,
                    "h": size,
                    **intrinsics,
                    "transform_matrix": c2w.tolist(),
                }
            )
    # nerfstudio honours this override; without it the parser turns the scene upright on its own terms
    return {"camera_model": "OPENCV", "orientation_override": "none", "frames": frames}


def _check_transforms(path: Path, expected: dict[str, Any]) -> None:
    """The file nerfstudio reads must tell the same story as grid.json; last-digit differences are allowed."""
    try:
        for found, wanted in zip(_read_json(path)["frames"], expected["frames"], strict=True):
            same = found["file_path"] == wanted["file_path"] and all(
                np.allclose(found[name], wanted[name], atol=1e-9) for name in wanted if name != "file_path"
            )
            if not same:
                raise ValueError(f"frame {wanted['file_path']}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} does not agree with {GRID_FILE} ({error}): make the views again instead of editing either file."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is not a view grid: it has no {path.name}; make the views again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): make the views again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object: make the views again.")
    return value


def _read_plan(values: dict[str, Any], path: Path) -> ViewPlan:
    try:
        return ViewPlan.from_dict(values)
    except InputError as error:
        raise InputError(f"{path} holds no usable plan: {error}") from error


def _positive_integer(description: dict[str, Any], name: str, folder: Path) -> int:
    value = description[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise InputError(
            f"{folder / GRID_FILE} has {name} = {str(value)[:20]!r}, not an integer from 1 to {LARGEST}: make the "
            "views again."
        )
    return value


def _read_image(path: Path, size: int, mode: str) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            # before any pixel is decoded, so that a forged header cannot ask for memory without end
            if image.size != (size, size) or image.mode != mode:
                raise InputError(
                    f"{path} is {image.mode} {image.size[0]}x{image.size[1]}, not the {mode} {size}x{size} that "
                    f"{GRID_FILE} promises: make the views again."
                )
            return np.array(image)
    except FileNotFoundError as error:
        raise InputError(f"The view grid lacks {path}: make the views again.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is damaged ({error}): make the views again.") from error
