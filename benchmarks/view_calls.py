"""More views than one call makes: do calls that are given finished views agree better than independent ones?

    python benchmarks/view_calls.py --objects 12 --steps 1

The embedded model makes its eight views in calls of four, for held-out procedural creatures. Beside the scores against
the truth, the hull: the silhouettes of one moment are carved into a visual hull, and the hull's own silhouettes are
compared with them. Views of one possible object lose nothing; the truth is not quite 1 because voxels are coarse.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, UInt8

from sv4d_ns.diffusion.embedded import load_embedded_pipeline
from sv4d_ns.diffusion.sv4d.grid import GridOptions, generate_grid
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.windows import ViewReferences
from sv4d_ns.diffusion_training.evaluate import FIRST_EVALUATED, Clip, as_floats, held_out_clip
from sv4d_ns.geometry.cameras import OBJECT_BOX, ViewPlan, look_at_cameras
from sv4d_ns.metrics.images import psnr, silhouette_iou

VOXELS = 72
FRAMES = 8


@dataclass(frozen=True)
class ViewCallsConfig:
    """Settings of the comparison."""

    objects: int = 12
    """Held-out creatures."""
    steps: int = 1
    """Denoising steps."""
    threads: int = 2
    """CPU threads."""


def hull_iou(masks: Bool[np.ndarray, "t v h w"], plan: ViewPlan) -> float:
    """Mean IoU of silhouettes with those of the visual hull they carve together."""
    axis = np.linspace(-OBJECT_BOX, OBJECT_BOX, VOXELS)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    size = masks.shape[-1]
    pixels = []
    for camera in look_at_cameras(np.array(plan.azimuths_deg), np.array(plan.absolute_elevations_deg[1:])):
        seen = (points - camera[:3, 3]) @ camera[:3, :3]
        xy = seen[:, :2] / -seen[:, 2:] * plan.focal_px(size) * [1, -1] + size / 2
        pixels.append(xy.astype(int).clip(0, size - 1).T)
    scores = []
    for moment in masks:
        inside = np.all([mask[y, x] for mask, (x, y) in zip(moment, pixels, strict=True)], axis=0)
        hull = np.zeros_like(moment)
        for silhouette, (x, y) in zip(hull, pixels, strict=True):
            silhouette[y[inside], x[inside]] = True
        scores.append(silhouette_iou(levels(hull), levels(moment)).mean())
    return float(np.mean(scores))


def made_views(
    pipeline: StableVideo4D2Pipeline, clip: Clip, references: ViewReferences, config: ViewCallsConfig, seed: int
) -> Float[np.ndarray, "t v h w 4"]:
    """The eight views of a clip."""
    video = torch.from_numpy(as_floats(clip.inputs)).float().permute(0, 3, 1, 2)
    plan = ViewPlan.EMBEDDED
    grid = generate_grid(
        pipeline,
        video,
        plan.azimuths_deg,
        plan.elevations_deg,
        seed=seed,
        store=None,
        on_progress=lambda done, total: None,
        options=GridOptions(references=references, num_inference_steps=config.steps),
    )
    return grid.images.permute(0, 1, 3, 4, 2).double().numpy()


def figures(made: Float[np.ndarray, "t v h w 4"], truth: Float[np.ndarray, "t v h w 4"], plan: ViewPlan) -> list[float]:
    """PSNR of RGB on white (dB), silhouette IoU, hull IoU."""
    masks = made[..., 3] >= 0.5
    return [
        float(psnr(colours(made), colours(truth)).mean()),
        float(silhouette_iou(levels(masks), levels(truth[..., 3] >= 0.5)).mean()),
        hull_iou(masks[::3], plan),
    ]


def colours(pictures: Float[np.ndarray, "t v h w 4"]) -> Float[torch.Tensor, "n 3 h w"]:
    """RGB as the metrics take it."""
    return torch.from_numpy(pictures[..., :3]).float().flatten(0, 1).movedim(-1, 1)


def levels(masks: Bool[np.ndarray, "*n h w"]) -> UInt8[np.ndarray, "m h w"]:
    """Masks as 8-bit alpha, one axis of pictures."""
    return (masks.reshape(-1, *masks.shape[-2:]) * 255).astype(np.uint8)


def main(config: ViewCallsConfig) -> None:
    """Print the table: means, and the difference to independent calls with its standard error."""
    torch.set_num_threads(config.threads)
    pipeline = load_embedded_pipeline("cpu")
    rows: dict[str, list[list[float]]] = {reference.value: [] for reference in ViewReferences} | {"truth": []}
    for index in range(config.objects):
        clip = held_out_clip(index, FRAMES, pipeline.config.image_size)
        truth = as_floats(clip.views)
        # clips of the even creatures are seen from elevation 0; of the others hulls are carved with their cameras
        elevation = 0.0 if index % 2 == 0 else np.random.default_rng([FIRST_EVALUATED, index]).uniform(-10.0, 30.0)
        plan = ViewPlan.ring(ViewPlan.EMBEDDED.azimuths_deg, elevation)
        for reference in ViewReferences:
            made = made_views(pipeline, clip, reference, config, seed=index)
            rows[reference.value].append(figures(made, truth, plan))
        rows["truth"].append(figures(truth, truth, plan))
    print(
        f"| {config.objects} objects, {config.steps} steps | PSNR, dB | silhouette IoU | hull IoU |\n|---|---|---|---|"
    )
    base = np.array(rows[ViewReferences.INDEPENDENT.value])
    for name, values in rows.items():
        mean, delta = np.mean(values, axis=0), np.array(values) - base
        error = delta.std(axis=0) / max(1, len(delta)) ** 0.5
        cells = [f"{m:.3f} ({d:+.3f} ± {e:.3f})" for m, d, e in zip(mean, delta.mean(axis=0), error, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(ViewCallsConfig, description=__doc__))
