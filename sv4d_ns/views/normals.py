"""Estimated normals of a grid's views, for the normal loss: from a folder of maps, or from a diffusers pipeline.

SV4D takes Omnidata's monocular normals of the generated pictures. Here the estimator is whatever the user has: maps on
disk, or a pipeline whose call returns normals as diffusers' `MarigoldNormalsPipeline` does. Nothing is downloaded.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, content_hash
from sv4d_ns.utils.images import over_white
from sv4d_ns.views.grid import ViewGrid, image_name

SMALLEST = 0.5
"""Maps whose vectors are shorter than this say nothing there."""


def estimated_normals(
    grid: ViewGrid, source: str, store: Path, device: str, progress: Progress
) -> list[Float[np.ndarray, "t h w 3"]]:
    """Unit normals in world space of every view of a grid, the input first; zero where there is no object.

    Args:
        source: a folder of maps named like the grid's images (`view00_frame0000.png`, ...; see `read_map`), the folder
            of a diffusers pipeline, or the name of one in the local Hugging Face cache.
        store: where an estimator's results are kept (the same pictures are not estimated twice).
        progress: called with (views done, views in all).

    Raises:
        InputError: the source is none of these, or a map is missing or damaged.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        in_camera = [_read_maps(folder, grid, view) for view in range(grid.num_views + 1)]
    else:
        in_camera = _estimate(grid, source, store, device, progress)
    return [
        _in_world(normals, grid.plan.c2w()[view], _pictures(grid, view)[..., 3])
        for view, normals in enumerate(in_camera)
    ]


def read_map(path: Path, size: int) -> Float[np.ndarray, "size size 3"]:
    """A normal map: 8-bit RGB, each channel 255 (n + 1) / 2 of camera axes x right, y up, z towards the camera."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            picture = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise InputError(
            f"The folder of normals lacks {path}: give one map for each picture of the grid, or leave "
            "--pipeline.datamanager.normals out."
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no normal map ({error}): make it again.") from error
    return np.asarray(picture, np.float32) / 127.5 - 1


def load_estimator(source: str, device: str) -> Any:
    """A diffusers pipeline that estimates normals.

    Raises:
        InputError: it is not on this machine, or estimates something else.
    """
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(source, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--pipeline.datamanager.normals {source} is neither a folder of normal maps nor a diffusers pipeline on "
            f"this machine: fetch it first (hf download {source}), or leave the flag out."
        ) from error
    if getattr(pipeline, "prediction_type", pipeline.config.get("prediction_type")) != "normals":
        raise InputError(
            f"--pipeline.datamanager.normals {source} is a {type(pipeline).__name__} for something other than normals: "
            "give one whose prediction type is normals (prs-eth/marigold-normals-v1-1)."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _pictures(grid: ViewGrid, view: int) -> np.ndarray:
    return grid.input_frames if view == 0 else grid.novel_views[:, view - 1]


def _read_maps(folder: Path, grid: ViewGrid, view: int) -> Float[np.ndarray, "t h w 3"]:
    names = [Path(image_name("images", view, frame)).name for frame in range(grid.num_frames)]
    return np.stack([read_map(folder / name, _pictures(grid, view).shape[1]) for name in names])


def _estimate(
    grid: ViewGrid, source: str, store: Path, device: str, progress: Progress
) -> list[Float[np.ndarray, "t h w 3"]]:
    import torch

    estimator, results = None, []
    for view in range(grid.num_views + 1):
        pictures = over_white(_pictures(grid, view))
        kept = store / f"{content_hash(pictures, source)}.npy"
        if not kept.is_file():
            estimator = estimator or load_estimator(source, device)
            normals = [
                estimator(Image.fromarray(picture), generator=torch.Generator(device).manual_seed(0)).prediction[0]
                for picture in pictures
            ]
            store.mkdir(parents=True, exist_ok=True)
            with atomic_path(kept) as path, path.open("wb") as file:
                np.save(file, np.stack(normals).astype(np.float16))
        results.append(_read_kept(kept).astype(np.float32))
        progress(view + 1, grid.num_views + 1)
    return results


def kept_flaw(path: Path) -> str | None:
    """What is wrong with a file in which an estimator's results are kept, and what to do; None where nothing is."""
    try:
        _read_kept(path)
    except InputError as error:
        return str(error)
    return None


def _read_kept(path: Path) -> Float[np.ndarray, "t h w 3"]:
    try:
        with path.open("rb") as file:
            normals = np.lib.format.read_array(file, allow_pickle=False)
        if normals.dtype != np.float16 or normals.shape[3:] != (3,):
            raise ValueError("it holds something else")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} holds no estimated normals ({error}): delete it; the next run estimates them again."
        ) from error
    return normals


def _in_world(
    normals: Float[np.ndarray, "t h w 3"], c2w: Float[np.ndarray, "4 4"], alpha: np.ndarray
) -> Float[np.ndarray, "t h w 3"]:
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    known = (length > SMALLEST) & (alpha[..., None] >= 128)
    turned = normals / np.maximum(length, SMALLEST) @ c2w[:3, :3].T.astype(np.float32)
    return np.where(known, turned, 0).astype(np.float32)
