"""Pictures of a fitted field: at the cameras of a view grid, and the contact sheet at the end of a run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from sv4d_ns.field.volume_rendering import render_rays_chunked
from sv4d_ns.geometry.rays import picture_rays
from sv4d_ns.metrics.images import pooled_iou, pooled_psnr
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.images import labelled, over_white, resize_rgba
from sv4d_ns.utils.threads import torch_threads
from sv4d_ns.views.grid import ViewGrid

if TYPE_CHECKING:
    from sv4d_ns.field.deformable import DeformableField
    from sv4d_ns.field.occupancy import OccupancyGrid

SHEET_SIZE = 160
SHEET_COLUMNS = 6


@torch.no_grad()
def render_rgba(
    field: "DeformableField",
    occupancy: "OccupancyGrid",
    c2w: Float[np.ndarray, "4 4"],
    focal: float,
    size: int,
    time: float,
    wanted: Bool[np.ndarray, "size size"] | None = None,
) -> UInt8[np.ndarray, "size size 4"]:
    """One square picture of the field, sRGB with straight alpha.

    Args:
        c2w: OpenGL camera-to-world matrix.
        focal: pixels; the principal point is the centre.
        time: in [0, 1].
        wanted: the pixels to draw, the others stay white and transparent; None draws all.
    """
    matrix = torch.tensor(c2w, dtype=torch.float32, device=field.aabb.device)  # a copy: it may be read-only
    origins, directions = picture_rays(matrix, focal, size)
    if wanted is not None:
        picture = np.full((size, size, 4), (255, 255, 255, 0), np.uint8)
        drawn = torch.from_numpy(wanted).to(matrix.device).reshape(-1)
        picture[wanted] = _rays_rgba(field, occupancy, origins[drawn], directions[drawn], time)
        return picture
    return _rays_rgba(field, occupancy, origins, directions, time).reshape(size, size, 4)


def _rays_rgba(
    field: "DeformableField",
    occupancy: "OccupancyGrid",
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    time: float,
) -> UInt8[np.ndarray, "n 4"]:
    if not len(origins):
        return np.zeros((0, 4), np.uint8)
    times = torch.full_like(origins[:, :1], time)
    out = render_rays_chunked(field, occupancy, origins, directions, times)
    alpha = out["alpha"][:, None].clamp(0, 1)
    colour = (out["rgb"] - (1 - alpha)) / alpha.clamp(min=1e-3)
    rgba = torch.cat([torch.where(alpha > 2e-3, colour.clamp(0, 1), torch.ones_like(colour)), alpha], -1)
    return (rgba * 255).round().byte().cpu().numpy()


def render_grid(
    field: "DeformableField", occupancy: "OccupancyGrid", grid: ViewGrid, size: int, progress: Progress
) -> UInt8[np.ndarray, "t v size size 4"]:
    """The field at every novel view and every time of a grid."""
    c2w, focal = grid.plan.c2w()[1:], grid.plan.focal_px(size)
    total = grid.num_frames * grid.num_views
    renders = np.empty((grid.num_frames, grid.num_views, size, size, 4), np.uint8)
    with torch_threads(1):  # rays are spread over threads already
        for frame, time in enumerate(grid.times):
            for view in range(grid.num_views):
                renders[frame, view] = render_rgba(field, occupancy, c2w[view], focal, size, float(time))
                progress(frame * grid.num_views + view + 1, total)
    return renders


@dataclass(frozen=True, eq=False)
class ResultSheet:
    """What came out of a run."""

    picture: Image.Image
    figures: dict[str, Any]
    """Of the field at the input camera, against the input video."""
    frames: Int[np.ndarray, " n"]
    """The moments shown."""
    views: tuple[int, ...]
    """Numbers of the novel views shown, from 1 as in the grid's file names."""
    novel_alpha: UInt8[np.ndarray, "n v s s"]
    """Alpha of the field at these moments and views."""


def result_sheet(
    field: "DeformableField", occupancy: "OccupancyGrid", grid: ViewGrid, progress: Progress
) -> ResultSheet:
    """What came out, as a picture and as figures.

    The picture's columns are moments; its rows are the input video, the field at the input camera, and the field at
    the novel views, each with its name. The figures compare the field with the input video at the input camera, at the
    sheet's size.
    """
    frames = np.unique(np.linspace(0, grid.num_frames - 1, SHEET_COLUMNS).round().astype(int))
    c2w, focal = grid.plan.c2w(), grid.plan.focal_px(SHEET_SIZE)
    shown = [0, *range(1, grid.num_views + 1, max(grid.num_views // 4, 1))]
    renders = np.empty((len(frames), len(shown), SHEET_SIZE, SHEET_SIZE, 4), np.uint8)
    for column, frame in enumerate(frames):
        for row, view in enumerate(shown):
            time = float(grid.times[frame])
            renders[column, row] = render_rgba(field, occupancy, c2w[view], focal, SHEET_SIZE, time)
            progress(column * len(shown) + row + 1, renders.shape[0] * renders.shape[1])
    inputs = resize_rgba(grid.input_frames[frames], SHEET_SIZE)
    truth, made = over_white(inputs) / 255.0, over_white(renders[:, 0]) / 255.0
    rows = [over_white(inputs), *over_white(renders).swapaxes(0, 1)]
    sheet = labelled(rows, _row_names(grid, shown[1:]), [f"{frame}: {frame / grid.fps:.2f} s" for frame in frames])
    summary = {
        "input_view_psnr": pooled_psnr(truth, made),
        "input_view_iou": pooled_iou(inputs[..., 3], renders[:, 0, ..., 3]),
        "frames_compared": frames.tolist(),
        "novel_views_shown": [grid.plan.azimuths_deg[view - 1] for view in shown[1:]],
    }
    return ResultSheet(Image.fromarray(sheet), summary, frames, tuple(shown[1:]), renders[:, 1:, ..., 3])


def _row_names(grid: ViewGrid, views: list[int]) -> list[str]:
    """Of the sheet's rows: degrees are relative to the input view, as everywhere."""
    places = [(grid.plan.azimuths_deg[view - 1], grid.plan.elevations_deg[view - 1]) for view in views]
    novel = [f"render {azimuth:g}°" + (f", {up:+g}° up" if up else "") for azimuth, up in places]
    return ["input", "render 0°", *novel]
