"""Fit one benchmark case with the field alone (no nerfstudio, no diffusion model) and report quality and time.

    python benchmarks/field_fit.py CASE_FOLDER --out OUT [--views truth|generated] [--size 128] [--set steps=800]

`truth` trains on the input view and the eight nv8 views; `generated` on the input view at --input-size and the nv4
views degraded the way a small generator degrades them (64x64, blurred, a slowly varying shift, zoom and colour gain per
view and frame). Judged on the two elevated views, the input camera and the geometry.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sv4d_ns.evaluation.alignment import Similarity
from sv4d_ns.evaluation.cases import Case
from sv4d_ns.evaluation.geometry import evaluate_geometry
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import render_rays, render_rays_chunked
from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
from sv4d_ns.fitting.learning_rates import LEARNING_RATES, decay_factor
from sv4d_ns.fitting.objective import loss_terms
from sv4d_ns.fitting.schedule import ScheduleConfig, apply_schedule
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.fitting.train_views import TrainView, hull_views, surface_flow
from sv4d_ns.geometry.rays import pixel_rays

FOV_TAN = float(np.tan(np.radians(33.9) / 2))


@dataclass
class View:
    """One camera's video: rgb [t, h, w, 3] on white, alpha [t, h, w]."""

    name: str
    azimuth: float
    c2w: Tensor
    rgb: Tensor
    alpha: Tensor
    weight: float = 1.0
    vote: float = 1.0

    @property
    def focal(self) -> float:
        return self.rgb.shape[2] / 2 / FOV_TAN


def load_views(case: Path, roles: set[str], size: int) -> list[View]:
    info = json.loads((case / "cameras.json").read_text())
    views = []
    for v in info["views"]:
        if not roles & set(v["roles"]):
            continue
        frames = np.stack([np.asarray(Image.open(case / f).convert("RGBA")) for f in v["frames"]])
        rgba = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        alpha = rgba[:, 3:]
        composed = torch.cat([rgba[:, :3] * alpha + 1 - alpha, alpha], 1)
        composed = functional.interpolate(composed, size=(size, size), mode="area")
        rgb, a = composed[:, :3].permute(0, 2, 3, 1), composed[:, 3]
        views.append(View(v["id"], v["azimuth_deg"], torch.tensor(v["c2w"], dtype=torch.float32), rgb, a))
    return views


def degrade(view: View, size: int, rng: np.random.Generator) -> View:
    """What a small generator does: low resolution, blur, wandering pose and colour (smooth in time)."""
    t = view.rgb.shape[0]
    rgba = torch.cat([view.rgb, view.alpha[..., None]], -1).permute(0, 3, 1, 2)
    drift = rng.normal(size=(6, 6))
    basis = np.stack([np.ones(t), *[f(np.linspace(0, k * np.pi, t)) for k in (1, 2) for f in (np.sin, np.cos)]])
    basis = np.concatenate([basis, rng.normal(size=(1, t)) * 0.5])
    dx, dy, zoom, *gain = drift @ basis / np.sqrt(6)
    theta = torch.zeros(t, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.tensor(1 + 0.02 * zoom)
    theta[:, 0, 2], theta[:, 1, 2] = torch.tensor(0.02 * dx), torch.tensor(0.02 * dy)
    grid = functional.affine_grid(theta, list(rgba.shape), align_corners=False)
    rgba = 1 - functional.grid_sample(1 - rgba, grid, align_corners=False)
    rgba[:, 3] = (
        1 - functional.grid_sample(1 - view.alpha[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    )
    rgba[:, 3] = functional.grid_sample(view.alpha[:, None], grid, align_corners=False)[:, 0]
    rgba = functional.interpolate(rgba, size=(size, size), mode="area")
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel)[None, None].repeat(4, 1, 1, 1)
    rgba = functional.conv2d(functional.pad(rgba, (1, 1, 1, 1), mode="replicate"), kernel, groups=4)
    shift = torch.tensor(np.stack(gain)).float().t()[:, :, None, None] * 0.03
    rgba[:, :3] = (rgba[:, :3] + shift * rgba[:, 3:]).clamp(0, 1)
    return replace(view, rgb=rgba[:, :3].permute(0, 2, 3, 1).contiguous(), alpha=rgba[:, 3].contiguous())


@dataclass
class FitConfig:
    seconds: float = 1e9
    steps: int = 1500
    n_samples: int = 128
    lr_encoding: float = LEARNING_RATES["encoding"]
    lr_heads: float = LEARNING_RATES["heads"]
    lr_deformation: float = LEARNING_RATES["deformation"]
    lr_appearance: float = LEARNING_RATES["appearance"]
    lr_density_residual: float = LEARNING_RATES["density_residual"]
    occupancy_every: int = 4
    canonical: Literal["largest", "first"] = "largest"
    hull_margin: float | None = None
    occupancy_threshold: float = 0.05
    occupancy_decay: float = 0.7
    seed: int = 0


class Profile:
    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.mark = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.wall[name] = self.wall.get(name, 0) + now - self.mark
        self.mark = now


def fit(
    views: list[View],
    config: FitConfig,
    weights: LossWeights,
    field_config: DeformableFieldConfig,
    schedule: ScheduleConfig,
    batch_config: BatchConfig,
    log: Callable[[str], None],
) -> tuple[DeformableField, OccupancyGrid, dict]:
    torch.manual_seed(config.seed)
    n_frames = views[0].rgb.shape[0]
    canonical = int(views[0].alpha.sum((1, 2)).argmax()) if config.canonical == "largest" else 0
    field_config = replace(field_config, canonical_time=canonical / (n_frames - 1), keyframes=n_frames)
    field = DeformableField(field_config)
    occupancy = OccupancyGrid(n_frames, threshold=config.occupancy_threshold, decay=config.occupancy_decay)
    start = time.perf_counter()
    train = []
    for number, v in enumerate(views):
        ones = torch.ones_like(v.alpha)
        train.append(
            TrainView(
                number, v.azimuth, v.c2w, v.focal, v.rgb, v.alpha, ones, v.weight * ones, None, v.vote >= 1, v.vote
            )
        )
    occupancy.carve(hull_views(train), config.hull_margin)
    field.confine(occupancy.hull[canonical])
    flow = surface_flow(train, occupancy.half_extent, canonical) if weights.scene_flow else None
    log(f"carve {time.perf_counter() - start:.2f} s, hull share {occupancy.hull.float().mean():.4f}")
    groups = field.parameter_groups()
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": getattr(config, f"lr_{name}")} for name, parameters in groups.items()],
        betas=(0.9, 0.99),
        eps=1e-15,
        fused=True,
    )
    base_lr = [g["lr"] for g in optimizer.param_groups]
    sampler = BatchSampler(train, batch_config, schedule, config.seed)
    profile, start, cpu, n_evaluated = Profile(), time.perf_counter(), time.process_time(), 0
    for step in range(config.steps):
        if time.perf_counter() - start > config.seconds:
            log(f"time is over at step {step}")
            break
        profile.mark = time.perf_counter()
        for group, lr in zip(optimizer.param_groups, base_lr, strict=True):
            group["lr"] = lr * decay_factor(step, config.steps)
        window = apply_schedule(field, occupancy, flow, schedule, step, config.steps, config.occupancy_every)
        profile.lap("occupancy")

        batch = sampler.draw(step, window, canonical)
        profile.lap("batch")
        out = render_rays(field, occupancy, batch.origins, batch.directions, batch.times, config.n_samples,
                          background=batch.background, jitter=batch.jitter, moments=batch.moments)  # fmt: skip
        n_evaluated += len(out.weights)
        profile.lap("render")
        parts = loss_terms(field, occupancy, flow, out, batch, weights, config.seed, step)
        profile.lap("losses")
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        profile.lap("backward")
        optimizer.step()
        profile.lap("optimizer")
        if step % 250 == 249:
            log(f"step {step + 1} {time.perf_counter() - start:.0f} s cpu {time.process_time() - cpu:.0f} s "
                f"{len(window)} frames, samples/ray {len(out.weights) / len(batch.alpha):.1f} "
                + " ".join(f"{k} {v.item():.5f}" for k, v in parts.items()))  # fmt: skip
    steps = step + 1
    report = {
        "steps": steps,
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "samples_per_step": n_evaluated / steps,
        "ms_per_step": {k: 1e3 * v / steps for k, v in profile.wall.items()},
    }
    return field, occupancy, report


def render_view(field, occupancy, view: View, frame: int, size: int, n_samples: int = 192) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    row, col = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    xy = torch.stack([col, row], -1).reshape(-1, 2) + 0.5
    n = len(xy)
    origins, directions = pixel_rays(
        xy, view.c2w.expand(n, 4, 4), torch.full((n,), size / 2 / FOV_TAN), torch.full((n, 2), float(size))
    )
    times = torch.full((n, 1), frame / (view.rgb.shape[0] - 1))
    out = render_rays_chunked(field, occupancy, origins, directions, times, n_samples)
    return {k: v.reshape(size, size, *v.shape[1:]) for k, v in out.items()}


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a.clamp(0, 1) - b).square().mean().clamp(min=1e-10)))


def evaluate(field, occupancy, held_out: list[View], input_view: View, case: Path, out: Path) -> dict:  # type: ignore[no-untyped-def]
    frames = [0, 5, 10, 15, 20]
    result: dict = {}
    sheet = []
    for label, views in (("elev", held_out), ("input", [input_view])):
        p, iou = [], []
        for view in views:
            size = view.rgb.shape[1]
            row = []
            for frame in frames:
                r = render_view(field, occupancy, view, frame, size)
                p.append(psnr(r["rgb"], view.rgb[frame]))
                a, b = r["alpha"] > 0.5, view.alpha[frame] > 0.5
                iou.append(float((a & b).sum() / (a | b).sum().clamp(min=1)))
                row.append(torch.cat([view.rgb[frame], r["rgb"], r["alpha"][..., None].expand(-1, -1, 3)], 0))
            sheet.append(
                functional.interpolate(torch.cat(row, 1).permute(2, 0, 1)[None], scale_factor=128 / size, mode="area")[
                    0
                ].permute(1, 2, 0)
                if size != 128
                else torch.cat(row, 1)
            )
        result[f"{label}_psnr"], result[f"{label}_iou"] = float(np.mean(p)), float(np.mean(iou))
        result[f"{label}_psnr_per_frame"] = np.round(np.reshape(p, (len(views), -1)).mean(0), 2).tolist()
    Image.fromarray((torch.cat(sheet).clamp(0, 1) * 255).byte().numpy()).save(out / "sheet.png")
    identity = Similarity(scale=1.0, rotation=np.eye(3), translation=np.zeros(3))
    truth = Case.load(case).geometry()
    assert truth is not None
    result |= evaluate_geometry(field, occupancy, truth, np.linspace(0, 1, len(input_view.rgb)), identity)
    result["chamfer_per_frame"] = [round(frame["chamfer"], 4) for frame in result.pop("per_frame")]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", choices=["truth", "generated"], default="truth")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--input-size", type=int, default=256)
    parser.add_argument(
        "--set", nargs="*", default=[], help="name=value of FitConfig, LossWeights, field, schedule or batch"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    configs = [FitConfig(), LossWeights(), DeformableFieldConfig(), ScheduleConfig(), BatchConfig()]
    for item in args.set:
        name, value = item.split("=")
        owners = [i for i, c in enumerate(configs) if name in {f.name for f in fields(c)}]
        if len(owners) != 1:
            parser.error(f"{name} is no setting")
        configs[owners[0]] = replace(configs[owners[0]], **{name: json.loads(value)})
    if args.views == "truth":
        views = load_views(args.case, {"input"}, args.size) + load_views(args.case, {"nv8"}, args.size)
        # All views are real here: none deserves more rays than another.
        configs[4] = replace(configs[4], input_share=0.0)
    else:
        rng = np.random.default_rng(1)
        views = load_views(args.case, {"input"}, args.input_size)
        for v in load_views(args.case, {"nv4"}, 128):
            gap = abs((v.azimuth + 180) % 360 - 180) / 180
            views.append(replace(degrade(v, 64, rng), weight=1 - 0.75 * gap, vote=0.5))
    field, occupancy, report = fit(views, *configs, print)  # type: ignore[arg-type]
    report |= evaluate(field, occupancy, load_views(args.case, {"elev"}, args.size), views[0], args.case, args.out)
    torch.save({"field": field.state_dict(), "occupancy": occupancy.state_dict()}, args.out / "state.pt")
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
