"""Pictures of a training run: the loss curve and held-out samples beside the truth."""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion_training.data import to_model_images
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.procedural import HELD_OUT_SEEDS, creature, render
from sv4d_ns.utils.files import atomic_path

SHEET_OBJECTS = 6
SHEET_AZIMUTHS = (40.0, 120.0, 200.0, 280.0)
SHEET_PICTURE = 128
"""Smaller pictures are enlarged to about this size on a sheet."""
CURVE_SIZE = (900, 420)
MARGIN = 48


def smoothed(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean over the last `window` values."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)


def loss_curve(log: Path, path: Path, steps_3d: int) -> None:
    """Draw loss (mean of 100 steps, logarithmic) over steps; still and clip batches in two colours.

    A vertical line marks the end of the first stage.
    """
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    entries = [entry for entry in entries if not entry["skipped"]]
    width, height = CURVE_SIZE
    picture = Image.new("RGB", CURVE_SIZE, "white")
    pen = ImageDraw.Draw(picture)
    last = max(entry["step"] for entry in entries)
    kinds = {"single moments": (False, (31, 90, 180)), "clips": (True, (200, 80, 20))}
    curves = {}
    for name, (moving, colour) in kinds.items():
        chosen = [entry for entry in entries if (entry["frames"] > 1) == moving]
        if chosen:
            losses = np.log10(smoothed(np.array([entry["loss"] for entry in chosen]), 100))
            curves[name] = (np.array([entry["step"] for entry in chosen]), losses, colour)
    low = np.floor(min(values.min() for _, values, _ in curves.values()) * 10) / 10
    high = np.ceil(max(values.max() for _, values, _ in curves.values()) * 10) / 10 + 1e-6

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (width - 2 * MARGIN) * step / last
        return x, height - MARGIN - (height - 2 * MARGIN) * (value - low) / (high - low)

    for value in np.linspace(low, high, 6):
        pen.line([place(0, value), place(last, value)], fill=(225, 225, 225))
        pen.text((4, place(0, value)[1] - 6), f"{10**value:.3f}", fill=(60, 60, 60))
    if 0 < steps_3d < last:
        pen.line([place(steps_3d, low), place(steps_3d, high)], fill=(150, 150, 150))
        pen.text((place(steps_3d, high)[0] + 4, MARGIN - 14), "4D stage", fill=(60, 60, 60))
    for row, (name, (steps, values, colour)) in enumerate(curves.items()):
        pen.line([place(step, value) for step, value in zip(steps, values, strict=True)], fill=colour, width=2)
        pen.text((width - 230, MARGIN + 14 * row), f"{name} (v-prediction MSE)", fill=colour)
    pen.text((width // 2 - 40, height - 30), f"steps (0 to {last})", fill=(60, 60, 60))
    with atomic_path(path) as temporary:
        picture.save(temporary)


def on_white(pictures: UInt8[np.ndarray, "... h w 4"]) -> Float[np.ndarray, "... h w 3"]:
    """RGB in [0, 1] composited on white."""
    values = pictures.astype(np.float64) / 255.0
    return values[..., :3] * values[..., 3:] + 1.0 - values[..., 3:]


def sample_sheet(pipeline: StableVideo4D2Pipeline, path: Path) -> None:
    """One row an object: input, truth of four views, samples of four views."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for index in range(SHEET_OBJECTS):
        cameras = look_at_cameras(np.array([0.0, *SHEET_AZIMUTHS]), np.zeros(5))
        size = pipeline.config.image_size
        pictures = render(creature(HELD_OUT_SEEDS.start + index), np.array([0.3]), cameras, size)[0]
        sampled = sample_views(pipeline, pictures[None, 0], SHEET_AZIMUTHS, seed=index)[0]
        shown = sampled.permute(0, 2, 3, 1).numpy()[..., :3]
        rows.append(np.concatenate([*on_white(pictures), *shown], axis=1))
    sheet = (np.concatenate(rows) * 255).round().astype(np.uint8)
    with atomic_path(path) as temporary:
        factor = max(1, SHEET_PICTURE // size)
        Image.fromarray(sheet.repeat(factor, axis=0).repeat(factor, axis=1)).save(temporary)


def sample_views(
    pipeline: StableVideo4D2Pipeline, inputs: UInt8[np.ndarray, "t h w 4"], azimuths: tuple[float, ...], seed: int
) -> Float[Tensor, "t v 4 h w"]:
    """Novel views at the input's elevation in [0, 1], RGB on white and, where the model has it, alpha."""
    video = (to_model_images(inputs, pipeline.vae.config.in_channels) + 1) / 2
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(video, list(azimuths), [0.0] * len(azimuths), generator=generator, return_dict=False)
    return torch.as_tensor(output[0]).cpu()
