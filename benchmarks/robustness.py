"""What the corrections of generated views are worth on views that are wrong in a known way.

    python benchmarks/robustness.py --cases DIR --out DIR [--only fox_run --steps 800]

Takes the true novel views of a case and spoils them: every camera turned by 2 degrees about the object in a direction
of its own and up to 2 % too near or far (`pose`), each view's hue turned by up to 20 degrees and its brightness changed
by up to 10 % (`color`), one view replaced by that of another case (`replaced`). Each spoiled grid, and the true one, is
fitted with the corrections off and on (the field alone), and judged on two elevated views, which
were in no fit. The switches are those of `--pipeline.model.corrections`
and `--pipeline.datamanager.leave-out`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from grid_fit import FitOptions, GridFit
from jaxtyping import Float, UInt8
from PIL import Image
from torch.nn import functional

from sv4d_ns.evaluation.cases import Case, find_cases
from sv4d_ns.field import images as renders
from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.fitting.corrections import ViewCorrections
from sv4d_ns.fitting.settings import CorrectionConfig, LossWeights
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.views.grid import ViewGrid, over_white

POSE_ERROR_DEG = 2.0
SCALE_ERROR = 0.02
HUE_ERROR_DEG = 20.0
BRIGHTNESS_ERROR = 0.1

OFF = CorrectionConfig(pose=False, color=False, robust=False)
SWITCHES = {
    "off": OFF,
    "pose": replace(OFF, pose=True),
    "color": replace(OFF, color=True),
    "robust": replace(OFF, robust=True),
    "leave_out": OFF,
    "all": CorrectionConfig(pose=True, color=True, robust=True),
    "default": CorrectionConfig(),
}
LEAVING_OUT = {"leave_out", "all", "default"}
LOSSES = {
    "depth_smoothness": LossWeights(depth_smoothness=0.1),
    "bilateral_normal": LossWeights(bilateral_normal=0.02),
    "no_bilateral_normal": LossWeights(bilateral_normal=0.0),
}
"""Losses to compare with the default ones; everything else is as for "off"."""


@dataclass
class Robustness:
    """Fit spoiled grids with corrections on and off."""

    cases: Path
    """A case, or a folder of cases; the first other case lends the wrong view."""
    out: Path
    """Where the table goes; finished fits are kept there and not made again."""
    only: tuple[str, ...] = ()
    """Names of some cases; all of them by default."""
    pairs: tuple[str, ...] = (
        "none:off",
        "pose:off",
        "pose:pose",
        "color:off",
        "color:color",
        "replaced:off",
        "replaced:robust",
        "replaced:leave_out",
        "none:all",
    )
    """What is wrong (none, pose, color, replaced) and what is switched on (off, pose, color, leave_out, robust, all,
    default, or a loss of `LOSSES`)."""
    steps: int = 500
    """Optimisation steps of each fit."""
    rays: int = 768
    """Single rays of a step."""
    size: int = 96
    """Pixels along the side of all pictures."""
    frames: int = 9
    """Frames of the clip, from its beginning."""

    def main(self) -> None:
        """Fit, judge and print a table, a row for each case and pair."""
        rows = []
        for folder in find_cases(self.cases, self.only):
            case = Case.load(folder)
            others = [other for other in find_cases(self.cases) if other.name != folder.name]
            for pair in self.pairs:
                name = f"{case.name}-{pair.replace(':', '-')}-{self.steps}x{self.rays}-{self.frames}-{self.size}"
                finished = self.out / f"{name}.json"
                if finished.is_file():
                    rows.append(json.loads(finished.read_text()))
                    continue
                error, switch = pair.split(":")
                whole = case.grid(case.with_role("nv8"), self.size)
                grid = replace(
                    whole, input_frames=whole.input_frames[: self.frames], novel_views=whole.novel_views[: self.frames]
                )
                self.out.mkdir(parents=True, exist_ok=True)
                row: dict[str, Any] = {"case": case.name, "wrong": error, "on": switch}
                row |= self.fit(SPOIL[error](grid, others), case, switch, name)
                with atomic_path(finished) as path:
                    path.write_text(json.dumps(row, indent=1))
                rows.append(row)
                print(row, flush=True)
        print(table(rows))

    def fit(self, spoiled: "Spoiled", case: Case, switch: str, name: str) -> dict[str, Any]:
        """Fit one grid and judge the field on the elevated views."""
        grid = spoiled.grid
        options = FitOptions(
            self.steps,
            self.rays,
            SWITCHES.get(switch, OFF),
            LOSSES.get(switch, LossWeights()),
            leave_out=switch in LEAVING_OUT,
        )
        fit = GridFit(grid, options).run(self.steps)
        figures = judge(fit.field, fit.occupancy, case, grid.times, self.size, self.out / f"{name}.png")
        trust = [round(weight, 3) for weight in fit.corrections.trust().tolist()]
        return {
            **figures,
            **pose_left(fit.corrections, spoiled),
            "cpu_s": round(fit.cpu_s, 1),
            "views": len(fit.sampler.views),
            "trust": trust,
        }


# ------------------------------------------------------------------------------------------------------------ spoiling


@dataclass(frozen=True)
class Spoiled:
    """A grid that is wrong, and where its novel views were really taken from."""

    grid: ViewGrid
    c2w: Float[np.ndarray, "v 4 4"]


def as_it_is(grid: ViewGrid, others: list[Path]) -> Spoiled:
    """Nothing is wrong."""
    return Spoiled(grid, grid.plan.c2w()[1:])


def wrong_pose(grid: ViewGrid, others: list[Path]) -> Spoiled:
    """Each camera is stated `POSE_ERROR_DEG` off, about an axis of its own, and its pictures are too large or small.

    The part of the turn about the viewing axis is done to the pictures, the rest to the stated angles.
    """
    rng = np.random.default_rng(5)
    count, plan = grid.num_views, grid.plan
    axis = rng.normal(size=(count, 3))
    turn = POSE_ERROR_DEG * axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    zoom = 1 + rng.uniform(-SCALE_ERROR, SCALE_ERROR, count)
    stated = replace(
        plan,
        azimuths_deg=tuple(np.array(plan.azimuths_deg) + turn[:, 0] / np.cos(np.radians(plan.input_elevation_deg))),
        elevations_deg=tuple(np.array(plan.elevations_deg) + turn[:, 1]),
    )
    true = plan.c2w()[1:]
    pictures = grid.novel_views.copy()
    for view in range(count):
        angle = np.radians(turn[view, 2])
        cos, sin = np.cos(angle), np.sin(angle)
        pictures[:, view] = warped(pictures[:, view], np.array([[cos, sin], [-sin, cos]]) / zoom[view])
        true[view, :3, :2] = true[view, :3, :2] @ np.array([[cos, -sin], [sin, cos]])
        true[view, :3, 3] /= zoom[view]
    return Spoiled(replace(grid, novel_views=pictures, plan=stated), true)


def wrong_color(grid: ViewGrid, others: list[Path]) -> Spoiled:
    """Each view has a hue and a brightness of its own."""
    rng = np.random.default_rng(6)
    pictures = grid.novel_views.copy()
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    for view in range(grid.num_views):
        angle = np.radians(rng.uniform(-HUE_ERROR_DEG, HUE_ERROR_DEG))
        turn = grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * cross
        gain = 1 + rng.uniform(-BRIGHTNESS_ERROR, BRIGHTNESS_ERROR)
        color = gain * pictures[:, view, ..., :3].astype(np.float32) @ turn.T.astype(np.float32)
        pictures[:, view, ..., :3] = color.round().clip(0, 255).astype(np.uint8)
    return Spoiled(replace(grid, novel_views=pictures), grid.plan.c2w()[1:])


def wrong_object(grid: ViewGrid, others: list[Path]) -> Spoiled:
    """The third view shows another case's object."""
    other = Case.load(others[0])
    pictures = grid.novel_views.copy()
    pictures[:, 2] = other.frames(other.with_role("nv8")[2], grid.novel_views.shape[2])[: grid.num_frames]
    return Spoiled(replace(grid, novel_views=pictures), grid.plan.c2w()[1:])


SPOIL: dict[str, Callable[[ViewGrid, list[Path]], Spoiled]] = {
    "none": as_it_is,
    "pose": wrong_pose,
    "color": wrong_color,
    "replaced": wrong_object,
}


def warped(rgba: UInt8[np.ndarray, "t h w 4"], matrix: Float[np.ndarray, "2 2"]) -> UInt8[np.ndarray, "t h w 4"]:
    """Pictures whose pixel at x (from the centre, y down) is taken from matrix @ x; premultiplied bilinear."""
    values = torch.from_numpy(rgba).float().movedim(-1, 1) / 255
    values[:, :3] *= values[:, 3:]
    theta = torch.from_numpy(np.concatenate([matrix, np.zeros((2, 1))], 1)).float().expand(len(rgba), 2, 3)
    grid = functional.affine_grid(theta, list(values.shape), align_corners=False)
    values = functional.grid_sample(values, grid, align_corners=False)
    values[:, :3] /= values[:, 3:].clamp(min=1e-3)
    return (255 * values.clamp(0, 1)).round().byte().movedim(1, -1).numpy()


# ------------------------------------------------------------------------------------------------------------- judging


def judge(
    field: DeformableField,
    occupancy: OccupancyGrid,
    case: Case,
    times: Float[np.ndarray, " t"],
    size: int,
    sheet: Path,
) -> dict[str, float]:
    """PSNR and silhouette IoU at the elevated views, mean over five moments; a picture of truth above field."""
    figures: dict[str, list[float]] = {"psnr": [], "iou": []}
    rows, moments = [], np.linspace(0, len(times) - 1, 5).round().astype(int)
    focal = case.focal_px * size / case.size
    for view in case.with_role("elev"):
        truth = case.frames(view, size)
        for frame in moments:
            made = renders.render_rgba(field, occupancy, view.c2w, focal, size, float(times[frame]))
            figures["psnr"].append(renders.psnr(over_white(truth[frame]) / 255, over_white(made) / 255))
            figures["iou"].append(renders.silhouette_iou(truth[frame, ..., 3], made[..., 3]))
            rows.append(np.concatenate([over_white(truth[frame]), over_white(made)]))
    Image.fromarray(np.concatenate(rows, 1)).save(sheet)
    return {name: round(float(np.mean(values)), 4) for name, values in figures.items()}


def pose_left(corrections: ViewCorrections, spoiled: Spoiled) -> dict[str, float]:
    """Mean angle between stated and true cameras before and after the corrections, degrees; of distances, percent."""
    with torch.no_grad():
        rotation, scale = corrections.rotations()[1:].double().numpy(), corrections.scales()[1:].double().numpy()
    stated, true = spoiled.grid.plan.c2w()[1:], spoiled.c2w

    def angle(a: np.ndarray, b: np.ndarray) -> float:
        cosine = (np.trace(a.swapaxes(-1, -2) @ b, axis1=-2, axis2=-1) - 1) / 2
        return round(float(np.degrees(np.arccos(cosine.clip(-1, 1))).mean()), 3)

    distance = np.linalg.norm(true[:, :3, 3], axis=-1) / np.linalg.norm(stated[:, :3, 3], axis=-1)
    return {
        "angle_before_deg": angle(stated[:, :3, :3], true[:, :3, :3]),
        "angle_after_deg": angle(rotation @ stated[:, :3, :3], true[:, :3, :3]),
        "distance_before_pct": round(100 * float(np.abs(1 - distance).mean()), 3),
        "distance_after_pct": round(100 * float(np.abs(scale - distance).mean()), 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = ["case", "wrong", "on", "psnr", "iou", "angle_before_deg", "angle_after_deg", "cpu_s"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name])
                                       for name in names) + " |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(Robustness, description=__doc__).main()
