"""A picture of a sentence and a video of a picture, by models the user names; each is made once and kept."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, content_hash
from sv4d_ns.video.writer import write_h264

VIDEO_FPS = 7
"""Stable Video Diffusion's own."""
SIDE_STEP = 64
"""Pixels that a side is a multiple of: what latent video models need."""


def text_to_image(prompt: str, model: str, folder: Path, device: str, seed: int = 0, size: int | None = None) -> Path:
    """A picture of the prompt as a PNG in `folder`.

    Args:
        size: pixels along the side of a square picture; None takes the model's own size.

    Raises:
        InputError: the model cannot be had or makes no pictures.
    """
    path = folder / f"{content_hash('image', prompt, model, seed, size)}.png"
    if not path.is_file():
        flag = "--text-to-image-model"
        pipeline = _load(model, device, flag)
        sides = {} if size is None else {"height": size, "width": size}
        made = _call(pipeline, model, flag, prompt=prompt, generator=_generator(seed), **sides)
        picture = getattr(made, "images", [None])[0]
        if not isinstance(picture, Image.Image):
            raise InputError(f"--text-to-image-model {model} makes no pictures: give a text-to-image pipeline.")
        with atomic_path(path) as temporary:
            picture.save(temporary)
    return path


def image_to_video(image: Path, model: str, folder: Path, device: str, seed: int = 0, size: int | None = None) -> Path:
    """A video that starts from the picture, as an mp4 in `folder`.

    The video has the picture's proportions; diffusers would stretch it to the model's.

    Args:
        size: square root of the area of its frames, pixels; None takes the model's own area.

    Raises:
        InputError: the picture cannot be read, or the model cannot be had or makes no video.
    """
    try:
        picture = Image.open(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(f"--image {image} cannot be read ({error}): give a PNG or JPEG file.") from error
    path = folder / f"{content_hash('video', np.asarray(picture), model, seed, size)}.mp4"
    if not path.is_file():
        flag = "--image-to-video-model"
        pipeline = _load(model, device, flag)
        sides = video_sides(picture.size, size**2 if size is not None else own_area(pipeline))
        made = _call(pipeline, model, flag, image=picture, generator=_generator(seed), **sides)
        frames = getattr(made, "frames", None)
        if frames is None or not len(frames):
            raise InputError(f"--image-to-video-model {model} makes no video: give an image-to-video pipeline.")
        write_h264(path, (_as_bytes(np.asarray(frame)) for frame in frames[0]), VIDEO_FPS, crf=12)
    return path


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own_area(pipeline: Any) -> int | None:
    """Pixels of the pictures a pipeline makes where nobody says otherwise; None if its signature does not tell."""
    parameters = inspect.signature(pipeline.__call__).parameters
    sides = [parameters[name].default for name in ("height", "width") if name in parameters]
    return sides[0] * sides[1] if len(sides) == 2 and all(isinstance(side, int) for side in sides) else None


def video_sides(picture: tuple[int, int], area: int | None) -> dict[str, int]:
    """Height and width of about `area` pixels in the proportions of a picture (width, height); empty without area."""
    if area is None:
        return {}
    width, height = picture
    scale = (area / (width * height)) ** 0.5
    height, width = (max(round(side * scale / SIDE_STEP), 1) * SIDE_STEP for side in (height, width))
    return {"height": height, "width": width}


def _load(model: str, device: str, flag: str) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{flag} {model} cannot be loaded ({reason}): give a diffusers pipeline.") from error
    return pipeline.to(device)


def _call(pipeline: Any, model: str, flag: str, **arguments: Any) -> Any:
    try:
        return pipeline(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{flag} {model} does not take {', '.join(arguments)} ({error}): give another one.") from error


def _as_bytes(picture: np.ndarray) -> np.ndarray:
    values = picture[..., :3]
    return values if values.dtype == np.uint8 else np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
