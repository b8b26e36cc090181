"""Held-out evaluation: sampled novel views against the truth, beside two trivial answers.

    python -m sv4d_ns.diffusion_training.evaluate --model runs/sv4d/model --objects 32 --frames 8

The objects come from `HELD_OUT_SEEDS`; training never sees them. The two baselines every model must beat: copying the
input frame, and the mean picture of training objects seen from that view.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion_training.data import VIDEO_FRAMES
from sv4d_ns.diffusion_training.report import on_white, sample_views
from sv4d_ns.geometry.cameras import ViewPlan, look_at_cameras
from sv4d_ns.metrics.consistency import hull_agreement
from sv4d_ns.metrics.images import psnr, silhouette_iou, ssim
from sv4d_ns.metrics.lpips import lpips_at_hand
from sv4d_ns.training_data.procedural import HELD_OUT_SEEDS, TRAINING_SEEDS, creature, render
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.files import atomic_path

FIRST_EVALUATED = HELD_OUT_SEEDS.start + 1000
"""Evaluated creatures follow this seed; the ones of the training sheets come before it."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    model: Path
    """Folder of a pipeline that `sv4d train` saved."""
    objects: int = 32
    """Held-out creatures."""
    frames: int = 8
    """Frames of each clip, a twentieth of the motion apart."""
    mean_image_objects: int = 300
    """Training creatures in the mean picture of a view."""
    steps: tuple[int, ...] = ()
    """Numbers of sampling steps to compare; the model's own by default."""
    sigma_max: tuple[float, ...] = ()
    """First noise levels to compare; the model's own by default."""
    sigma_min: float | None = None
    """Last noise level; the model's own by default."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Of the sampling noise."""
    output: Path | None = None
    """Also write the rows as JSON here."""


@dataclass(frozen=True)
class Scores:
    """Means over all views of all frames of all objects.

    psnr: of RGB on white over the whole picture, dB. ssim: likewise. iou: of the silhouettes alpha >= 0.5. sharpness:
    mean absolute difference of neighbouring pixels divided by the truth's (1 is as sharp as the truth). motion: error
    of the difference of neighbouring frames divided by the true difference (temporal consistency: 0 is right, 1 is a
    still picture, above is flicker or wrong motion). hull: share of the silhouettes that one solid object can explain
    (cross-view consistency, 1 is best; `metrics.consistency`). seconds: of sampling, for each picture. lpips: with
    AlexNet, 0 for equal pictures; None where its weights are not on this machine or the pictures are too small.
    """

    name: str
    psnr: float
    ssim: float
    iou: float
    sharpness: float
    motion: float
    hull: float
    seconds: float = 0.0
    lpips: float | None = None


@dataclass(frozen=True)
class Clip:
    """One held-out creature: input frames and true views, RGBA."""

    inputs: UInt8[np.ndarray, "t h w 4"]
    views: UInt8[np.ndarray, "t v h w 4"]
    plan: ViewPlan


def held_out_clip(index: int, frames: int, size: int, plan: ViewPlan = ViewPlan.BUNDLED) -> Clip:
    """The index-th evaluated creature; every other one is seen from an elevation other than 0."""
    rng = np.random.default_rng([FIRST_EVALUATED, index])
    elevation = 0.0 if index % 2 == 0 else rng.uniform(-10.0, 30.0)
    cameras = look_at_cameras(np.array((0.0, *plan.azimuths_deg)), np.full(plan.num_views + 1, elevation))
    times = rng.uniform(0.0, 1.0 - (frames - 1) / (VIDEO_FRAMES - 1)) + np.arange(frames) / (VIDEO_FRAMES - 1)
    pictures = render(creature(FIRST_EVALUATED + index), times, cameras, size)
    return Clip(pictures[:, 0], pictures[:, 1:], ViewPlan.ring(plan.azimuths_deg, elevation))


def as_floats(pictures: UInt8[np.ndarray, "... h w 4"]) -> Float[np.ndarray, "... h w 4"]:
    """RGB on white and alpha, in [0, 1]."""
    return np.concatenate([on_white(pictures), pictures[..., 3:] / 255.0], axis=-1)


def mean_views(size: int, objects: int, plan: ViewPlan = ViewPlan.BUNDLED) -> np.ndarray:
    """Mean picture of training creatures from each view, [v, h, w, 4] in [0, 1]; elevations as in the evaluation."""
    rng = np.random.default_rng(TRAINING_SEEDS.start)
    total = np.zeros((plan.num_views, size, size, 4))
    for index in range(objects):
        elevation = 0.0 if index % 2 == 0 else rng.uniform(-10.0, 30.0)
        cameras = look_at_cameras(np.array(plan.azimuths_deg), np.full(plan.num_views, elevation))
        subject = creature(int(rng.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop)))
        total += as_floats(render(subject, rng.random(1), cameras, size)[0])
    return total / objects


def roughness(pictures: Float[np.ndarray, "... h w c"]) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float(np.abs(np.diff(pictures, axis=-2)).mean() + np.abs(np.diff(pictures, axis=-3)).mean())


def score(
    name: str, made: list[np.ndarray], truth: list[np.ndarray], plans: list[ViewPlan], seconds: float = 0.0
) -> Scores:
    """Scores of pictures [t, v, h, w, 4] in [0, 1] (RGB on white, alpha), one array and one view plan an object."""
    pairs = [(np.broadcast_to(m, t.shape), t) for m, t in zip(made, truth, strict=True)]
    return Scores(
        name,
        float(np.mean([psnr(_colours(m), _colours(t)).mean() for m, t in pairs])),
        float(np.mean([ssim(_colours(m), _colours(t)).mean() for m, t in pairs])),
        float(np.mean([silhouette_iou(_alpha(m), _alpha(t)).mean() for m, t in pairs])),
        float(np.mean([roughness(m[..., :3]) / roughness(t[..., :3]) for m, t in pairs])),
        float(np.mean([motion_error(m, t) for m, t in pairs])),
        float(np.mean([_hull(m, plan) for (m, _), plan in zip(pairs, plans, strict=True)])),
        seconds,
        _lpips(pairs),
    )


def _lpips(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    network = lpips_at_hand()
    colours = [(_colours(made), _colours(truth)) for made, truth in pairs]
    if network is None or not network.can_judge(colours[0][1]):
        return None
    return float(np.mean([network.distance(made, truth).mean() for made, truth in colours]))


def _colours(pictures: Float[np.ndarray, "t v h w 4"]) -> Float[Tensor, "n 3 h w"]:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pictures[..., :3], -1, 2))).float().flatten(0, 1)


def _alpha(pictures: Float[np.ndarray, "t v h w 4"]) -> UInt8[np.ndarray, "n h w"]:
    return (pictures[..., 3] * 255).round().astype(np.uint8).reshape(-1, *pictures.shape[2:4])


def motion_error(made: Float[np.ndarray, "t v h w 4"], truth: Float[np.ndarray, "t v h w 4"]) -> float:
    """Mean error of the change from frame to frame, in units of the true change; 0 for a single frame."""
    if len(truth) < 2:
        return 0.0
    change = np.diff(truth, axis=0)
    return float(np.abs(np.diff(made, axis=0) - change).mean() / max(np.abs(change).mean(), 1e-6))


def _hull(pictures: Float[np.ndarray, "t v h w 4"], plan: ViewPlan) -> float:
    """Mean agreement of the first and the last moment's silhouettes with their hull."""
    alpha = (pictures[[0, -1], ..., 3] * 255).round().astype(np.uint8)
    focal = plan.focal_px(alpha.shape[-1])
    return float(np.mean([hull_agreement(moment, plan.c2w()[1:], focal).mean() for moment in alpha]))


def sample_clip(pipeline: StableVideo4D2Pipeline, clip: Clip, plan: ViewPlan, seed: int) -> np.ndarray:
    """All views of a clip, [t, v, h, w, 4] in [0, 1], in interleaved calls of the model's number of views, which
    divides the plan's."""
    calls = plan.num_views // pipeline.config.num_views
    made = np.empty((*clip.views.shape[:4], 4))
    for call in range(calls):
        azimuths = plan.azimuths_deg[call::calls]
        frames = sample_views(pipeline, clip.inputs, azimuths, seed * calls + call)
        made[:, call::calls] = frames.permute(0, 1, 3, 4, 2).numpy()
    return made


def evaluate(config: EvaluateConfig) -> list[Scores]:
    """Both baselines, then the model with every combination of steps and sigma_max.

    Raises:
        InputError: when the model's folder is not one, or its calls do not make the scored views.
    """
    torch.set_num_threads(config.threads)
    folder = config.model
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds no model (no model_index.json): give --model the 'model' folder of a run.")
    pipeline = StableVideo4D2Pipeline.from_pretrained(folder)
    scored, at_once = ViewPlan.BUNDLED.num_views, pipeline.config.num_views
    if scored % at_once:
        raise InputError(
            f"--model {folder} makes {at_once} views at once, and the {scored} scored views are no multiple of that: "
            "give a model of 1, 2, 4 or 8 views."
        )
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.config.image_size
    clips = [held_out_clip(index, config.frames, size) for index in range(config.objects)]
    truth = [as_floats(clip.views) for clip in clips]
    plans = [clip.plan for clip in clips]
    mean = mean_views(size, config.mean_image_objects)[None]
    rows = [
        score("copy of the input frame", [as_floats(clip.inputs)[:, None] for clip in clips], truth, plans),
        score("mean training picture of the view", [mean] * len(clips), truth, plans),
    ]
    own = pipeline.scheduler.config
    sigma_min = own.sigma_min if config.sigma_min is None else config.sigma_min
    for sigma_max in config.sigma_max or (own.sigma_max,):
        settings = {**own, "sigma_max": sigma_max, "sigma_min": sigma_min}
        pipeline.scheduler = EulerDiscreteScheduler.from_config(settings)
        for steps in config.steps or (pipeline.config.num_inference_steps,):
            pipeline.register_to_config(num_inference_steps=steps)
            began = time.monotonic()
            made = [sample_clip(pipeline, clip, ViewPlan.BUNDLED, config.seed + i) for i, clip in enumerate(clips)]
            seconds = (time.monotonic() - began) / sum(clip.views.shape[0] * clip.views.shape[1] for clip in clips)
            rows.append(
                score(f"model, {steps} steps, sigma {sigma_max:g} to {sigma_min:g}", made, truth, plans, seconds)
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[Scores]) -> str:
    """A Markdown table."""
    lines = [
        "| | PSNR, dB | SSIM | LPIPS | silhouette IoU | sharpness | motion error | hull | s a picture |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost = f"{row.seconds:.3f}" if row.seconds else "-"
        lpips = "-" if row.lpips is None else f"{row.lpips:.3f}"
        numbers = f"{row.psnr:.2f} | {row.ssim:.3f} | {lpips} | {row.iou:.3f} | {row.sharpness:.2f} | {row.motion:.2f}"
        lines.append(f"| {row.name} | {numbers} | {row.hull:.3f} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    """Command line of the evaluation."""
    with one_sentence_errors():
        config = tyro.cli(EvaluateConfig, description=__doc__)
        rows = evaluate(config)
        print(table(rows))
        if config.output is not None:
            with atomic_path(config.output) as temporary:
                temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
