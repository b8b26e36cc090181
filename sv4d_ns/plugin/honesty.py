"""What a run can say of its own result, without truth: how much of it the camera saw, and how far to trust the rest.

The input view's PSNR says how well the field repeats what it was shown. Nothing of that kind exists for the sides the
camera never saw, so the run says how large they are, and how far the pictures of them that a model made agree with one
solid object. The bundled model's pictures are of one solid by their making, true or not: of these the run says how near
the truth they came where that was measured. All thresholds are our own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy.spatial import cKDTree
from torch import Tensor

from sv4d_ns.field.visibility import surface_map
from sv4d_ns.geometry.cameras import CAMERA_RADIUS, look_at_cameras
from sv4d_ns.synthesis.base import BUNDLED

if TYPE_CHECKING:
    from sv4d_ns.field.occupancy import OccupancyGrid
    from sv4d_ns.views.grid import ViewGrid

MAP_SIZE = 80
"""Pixels along the side of the maps surfaces are taken from: about 0.015 world units each."""
CELL = 0.03
"""World units: side of the cells by which surface is counted, and how near to a seen point it counts as seen."""
MOMENTS = 8
"""Frames in which is looked what the camera sees."""
AZIMUTHS_DEG, ELEVATIONS_DEG = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0), (-50.0, 0.0, 50.0)
"""Cameras that see all of the surface that can be seen from outside."""
LOW_SEEN, GOOD_SEEN = 0.35, 0.65
LOW_AGREEMENT, GOOD_AGREEMENT = 0.7, 0.85
BUNDLED_IOU = 0.65
"""Silhouette IoU with the truth of whole jobs with the bundled model, mean of six cases (0.58 to 0.71), at cameras none
of them used: benchmarks/results/bundled_whole_jobs.md."""


@dataclass(frozen=True)
class Unseen:
    """What is known of the sides the input camera did not see."""

    seen: float | None
    """Share of the surface the input camera saw in some frame, in [0, 1]; None where the field shows no surface."""
    agreement: float | None
    """Silhouette IoU of the field with the novel views it was first fitted to, in [0, 1]: one solid object cannot
    satisfy pictures that contradict each other. None without novel views."""
    made: bool
    """Whether a model made those views; else they came with the data."""
    bundled: bool = False
    """Whether that was the bundled model, whose views agree with one solid whatever they show."""

    @property
    def confidence(self) -> Literal["low", "fair", "good"]:
        """Of those sides: as good as the worse of the two figures, and low for the bundled model's guesses."""
        if self.seen is None or self.agreement is None or self.bundled:
            return "low"
        if (self.seen < LOW_SEEN and self.made) or self.agreement < LOW_AGREEMENT:
            return "low"
        return "good" if (self.seen >= GOOD_SEEN or not self.made) and self.agreement >= GOOD_AGREEMENT else "fair"

    def sentences(self, on_cuda: bool) -> list[str]:
        """What to tell the user, a paragraph each."""
        if self.seen is None:
            return ["Not seen: the field shows no surface yet, so nothing can be said of it; let the run go on."]
        source = "a model made it, and nothing here tells how true it is" if self.made else "it is from the views given"
        lines = [
            f"Not seen by the camera: {1 - self.seen:.0%} of the surface; {source}. {self._evidence()}".rstrip(),
            f"Confidence in the sides not seen: {self.confidence}.",
        ]
        if self.confidence == "low":
            lines[-1] += " The far side is a guess. " + self._remedy(on_cuda)
        return lines

    def _evidence(self) -> str:
        if self.bundled:
            return f"Of objects whose sides are known, the bundled model's had silhouettes of IoU {BUNDLED_IOU:.2f}."
        return "" if self.agreement is None else f"Its views agree with one solid object to IoU {self.agreement:.2f}."

    def _remedy(self, on_cuda: bool) -> str:
        if not self.made:
            return "What would help: views that show one object from cameras as their file says."
        better = "" if on_cuda else "the released model on a CUDA machine, "
        return f"What would help: a clip in which the object turns, {better}or views of your own (docs/views.md)."


def unseen(
    field: Any,
    occupancy: "OccupancyGrid",
    grid: "ViewGrid",
    rendered: UInt8[np.ndarray, "t v s s"],
    generated: UInt8[np.ndarray, "t v s s"],
) -> Unseen:
    """What is known of the sides of a fitted field that the input camera did not see.

    Args:
        rendered: alpha of the field at some novel views and frames.
        generated: alpha of the novel views stage 1 began with, there.
    """
    from sv4d_ns.metrics.images import pooled_iou

    agreement = pooled_iou(rendered, generated) if generated.size else None
    model = grid.provenance.get("model")
    return Unseen(seen_share(field, occupancy, grid), agreement, model is not None, model == BUNDLED)


@torch.no_grad()
def seen_share(field: Any, occupancy: "OccupancyGrid", grid: "ViewGrid") -> float | None:
    """Share of the canonical surface that the input camera sees in at least one frame; None where there is none.

    Surface is counted in cells of `CELL`. Points the camera sees at a frame are taken back to the canonical shape by
    the deformation.
    """
    device = field.aabb.device
    canonical = float(field.config.canonical_time)
    frames = np.unique(np.linspace(0, grid.num_frames - 1, MOMENTS).round().astype(int))
    times = [float(grid.times[frame]) for frame in frames]
    focal = grid.plan.focal_px(MAP_SIZE)

    def points(camera: Float[np.ndarray, "4 4"], time: float) -> Float[Tensor, "n 3"]:
        matrix = torch.as_tensor(camera, dtype=torch.float32, device=device)
        found = surface_map(field, occupancy, matrix, focal, MAP_SIZE, time)
        return found.points[found.alpha.flatten() > 0.5]

    around = look_at_cameras(
        np.repeat(AZIMUTHS_DEG, len(ELEVATIONS_DEG)), np.tile(ELEVATIONS_DEG, len(AZIMUTHS_DEG)), CAMERA_RADIUS
    )
    surface = torch.cat([points(camera, canonical) for camera in around])
    if not len(surface):
        return None
    cells = CELL * np.unique(np.round(surface.cpu().numpy() / CELL), axis=0)
    seen = [torch.zeros(0, 3, device=device)]
    for time in times:
        at = points(grid.plan.c2w()[0], time)
        if not len(at):
            continue
        seen.append(at + field.deformation(at, torch.full_like(at[:, :1], time)))
    found = torch.cat(seen).cpu().numpy()
    if not len(found):
        return 0.0
    distance, _ = cKDTree(found).query(cells, distance_upper_bound=CELL)
    return float(np.isfinite(distance).mean())
