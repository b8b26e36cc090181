"""How fast is the field? Ours against the literal build of the papers' text, in one run.

    python benchmarks/field.py --out DIR [--case FOLDER] [--seconds 120] [--threads 2] [--clock cpu]

The literal build is what a reader of SV4D's section 4 would write with nerfstudio 1.1.5: its torch `HashEncoding`
(16 levels of 2^19 entries), density, colour and deformation MLPs of our sizes, `UniformSampler` and `PDFSampler`
with 48 samples each, every frame and view from the start, MSE and mask loss, one dense Adam. Both are fitted to the
same views for the same time on the same threads and judged on two elevated views neither has seen.

Without `--case` the object is a procedural creature, so that the script needs no data. Three more tables: time per step
against rays and against the number of frames, and each part's time per sample beside what this machine's memory and
matrix products would allow (roofline). Times are this machine's; only their ratios mean something elsewhere.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn

from sv4d_ns.field.compositing import RaySamples, composite, spread
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig, mlp
from sv4d_ns.field.images import render_rgba
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import march
from sv4d_ns.fitting.fit import FitOptions, GridFit
from sv4d_ns.fitting.train_views import train_views
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.geometry.rays import pixel_rays
from sv4d_ns.metrics.images import pooled_psnr
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.images import over_white
from sv4d_ns.views.grid import ViewGrid

now = time.perf_counter
"""The clock of all figures; `FieldBenchmark.clock` sets it."""

RING = (30.0, 75.0, 120.0, 165.0, 210.0, 255.0, 300.0, 330.0)
ELEVATED = ((45.0, 30.0), (225.0, 30.0))


@dataclass
class FieldBenchmark:
    """Compare, measure and write field.md and field.json."""

    out: Path
    """Folder for the tables."""
    case: Path | None = None
    """A benchmark case (evaluation/cases.py); None renders a procedural creature."""
    seconds: float = 120.0
    """Time our build fits."""
    literal_seconds: float | None = None
    """Time the literal build fits; None gives it as much."""
    clock: Literal["wall", "cpu"] = "wall"
    """What is timed: time on the wall, or this process's own processor time (for a machine with other work; with more
    than one thread it counts them all)."""
    steps: int = 1500
    """Length of our schedule; as many steps as fit into `seconds` on a free machine is best."""
    size: int = 128
    """Pixels along the side of the views."""
    judged_size: int = 64
    """Pixels along the side of the held-out views: the literal build takes minutes for a picture of 128."""
    judged_frames: int = 5
    """Frames of each of them that are judged."""
    looks: int = 6
    """How often each build is judged."""
    frames: int = 21
    """Frames of the procedural creature."""
    seed: int = 7
    """The procedural creature."""
    rays: int = 2048
    """Rays of a step, in both builds."""
    threads: int = 2
    """Threads of torch and of the kernels."""
    literal: bool = True
    """Fit the literal build as well."""

    def main(self) -> None:
        """Run everything."""
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        global now
        now = time.process_time if self.clock == "cpu" else time.perf_counter
        grid, held_out = self.views()
        report: dict[str, Any] = {
            "threads": self.threads,
            "clock": self.clock,
            "ours": fit(Ours(grid, self.rays, self.steps), held_out, self.seconds, self.looks, self.judged_frames),
        }
        if self.literal:
            seconds = self.literal_seconds or self.seconds
            report["literal"] = fit(LiteralBuild(grid, self.rays), held_out, seconds, self.looks, self.judged_frames)
        self._write(report)
        build = Ours(grid, self.rays, 100)
        report["rays"] = {n: step_time(build, 20, n) for n in (512, 1024, 2048, 4096)}
        report["frames"] = {
            n: step_time(Ours(longer(grid, n), self.rays, 100), 20, self.rays)
            for n in (grid.num_frames, 10 * grid.num_frames)
        }
        report["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._write(report)
        report["roofline"] = roofline()
        print(self._write(report))

    def _write(self, report: dict[str, Any]) -> str:
        """What is known so far: a run that is cut keeps it."""
        self.out.mkdir(parents=True, exist_ok=True)
        text = tables(report)
        for name, content in (("field.json", json.dumps(report, indent=1)), ("field.md", text)):
            with atomic_path(self.out / name) as path:
                path.write_text(content)
        return text

    def views(self) -> tuple[ViewGrid, list[HeldOut]]:
        """What is fitted, and the views that are judged."""
        if self.case is not None:
            from sv4d_ns.evaluation.cases import Case

            case = Case.load(self.case)
            grid = case.grid(case.with_role("nv8"), self.size)
            shown = [(view.c2w, case.frames(view, self.judged_size)) for view in case.with_role("elev")]
        else:
            from sv4d_ns.training_data.procedural import creature, render

            plan, elevated = ViewPlan.ring(RING), ViewPlan(*(tuple(v) for v in zip(*ELEVATED, strict=True)))
            animal, times = creature(self.seed), np.linspace(0, 1, self.frames)
            pictures = render(animal, times, plan.c2w(), self.size)
            grid = ViewGrid(pictures[:, 0], np.ascontiguousarray(pictures[:, 1:]), plan, fps=10.0)
            extra = render(animal, times, elevated.c2w(), self.judged_size)
            shown = [(elevated.c2w()[k], extra[:, k]) for k in (1, 2)]
        focal = grid.plan.focal_px(self.judged_size)
        return grid, [HeldOut(c2w, focal, pictures, grid.times) for c2w, pictures in shown]


@dataclass(frozen=True)
class HeldOut:
    """A view that is not fitted."""

    c2w: Float[np.ndarray, "4 4"]
    focal: float
    pictures: np.ndarray
    """[t, s, s, 4], uint8, straight alpha."""
    times: np.ndarray


class Ours:
    """The package's own steps, with its default settings."""

    def __init__(
        self,
        grid: ViewGrid,
        rays: int,
        steps: int,
        device: str = "cpu",
        encoding: Literal["numba", "tinycudann"] = "numba",
    ) -> None:
        self.total = steps
        self.fit = GridFit(grid, FitOptions(steps=steps, rays=rays), device, encoding)
        self.field, self.occupancy = self.fit.field, self.fit.occupancy

    def step(self, number: int) -> None:
        self.fit.step = min(number, self.total)
        self.fit.take_step()

    @property
    def evaluated(self) -> int:
        return self.fit.evaluated

    def picture(self, view: HeldOut, frame: int) -> np.ndarray:
        size = view.pictures.shape[1]
        rgba = render_rgba(self.field, self.occupancy, view.c2w, view.focal, size, float(view.times[frame]))
        return over_white(rgba) / 255.0


def frequency_encoding(x: Float[Tensor, "n d"], octaves: int, alpha: float) -> Float[Tensor, "n e"]:
    """x, then sin and cos of pi 2^k x for k < octaves; octave k is faded in by clip(alpha - k, 0, 1).

    The fade is the raised cosine of Park et al. 2021 (Nerfies) eq. 8; alpha runs from 0 to `octaves`.
    """
    # Doubling the angle (sin 2a = 2 sin a cos a, cos 2a = 1 - 2 sin^2 a) costs two products where sin and cos cost
    # twenty, and float32 keeps six digits over the few octaves used.
    sin, cos = torch.sin(math.pi * x), torch.cos(math.pi * x)
    features = [x]
    for k in range(octaves):
        if k > 0:
            sin, cos = 2 * sin * cos, 1 - 2 * sin * sin
        fade = 0.5 * (1 - math.cos(math.pi * min(max(alpha - k, 0.0), 1.0)))
        features += [sin * fade, cos * fade]
    return torch.cat(features, -1)


class FrequencyMotion(nn.Module):
    """An MLP over (position, time) with annealed time frequencies; zero when new.

    SV4D's deformation (Xie et al. 2024, section 4).
    """

    progress: Tensor

    def __init__(self, width: int, layers: int, space_frequencies: int, time_frequencies: int) -> None:
        super().__init__()
        self.space_frequencies, self.time_frequencies = space_frequencies, time_frequencies
        inputs = 3 * (1 + 2 * space_frequencies) + 1 + 2 * time_frequencies
        self.net = mlp([inputs] + [width] * layers + [3])
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("progress", torch.tensor(1.0))

    def forward(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3"]:
        """Offsets at points in half extents (the box is [-1, 1]^3) and times in [0, 1]."""
        # Only time is annealed (as in SV4D): neighbouring limbs move apart from the first moving frame on. Its lowest
        # octave is open from the start: raw time alone gives only straight, even motion.
        space = frequency_encoding(x, self.space_frequencies, self.space_frequencies)
        alpha = 1 + float(self.progress) * (self.time_frequencies - 1)
        return self.net(torch.cat([space, frequency_encoding(t, self.time_frequencies, alpha)], -1))


class LiteralBuild(nn.Module):
    """SV4D's section 4 read literally, out of nerfstudio's parts."""

    SAMPLES = 48

    def __init__(self, grid: ViewGrid, rays: int) -> None:
        from nerfstudio.field_components.encodings import HashEncoding
        from nerfstudio.model_components.ray_samplers import PDFSampler, UniformSampler

        super().__init__()
        torch.manual_seed(0)
        config = DeformableFieldConfig()
        self.half_extent, self.rays = config.half_extent, rays
        self.encoding = HashEncoding(16, 16, 2048, 19, 2, implementation="torch")
        self.density_head = mlp([32, config.hidden_width, 1 + config.geometry_features])
        self.color_head = mlp([config.geometry_features, config.hidden_width, 3])
        self.deformation = FrequencyMotion(width=64, layers=3, space_frequencies=4, time_frequencies=5)
        self.uniform, self.pdf = UniformSampler(self.SAMPLES), PDFSampler(self.SAMPLES, include_original=False)
        self.views = train_views(grid, "cpu")
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-15)
        self.evaluated = rays * 2 * self.SAMPLES

    def step(self, number: int) -> None:
        rng = np.random.default_rng([0, number])
        frames, height, width = self.views[0].alpha.shape
        view, frame = rng.integers(len(self.views), size=self.rays), rng.integers(frames, size=self.rays)
        row, column = rng.integers(height, size=self.rays), rng.integers(width, size=self.rays)
        index = list(zip(view.tolist(), frame.tolist(), row.tolist(), column.tolist(), strict=True))
        rgb = torch.stack([self.views[v].rgb[f, r, c] for v, f, r, c in index])
        alpha = torch.stack([self.views[v].alpha[f, r, c] for v, f, r, c in index])
        c2w = torch.stack([self.views[v].c2w for v in view])
        xy = torch.from_numpy(np.stack([column, row], -1)).float() + 0.5
        focal = torch.full((self.rays,), self.views[0].focal)
        origins, directions = pixel_rays(xy, c2w, focal, torch.full((self.rays, 2), float(width)))
        times = torch.from_numpy(frame / max(frames - 1, 1)).float()[:, None]
        made, opacity = self.render(origins, directions, times)
        loss = (made - rgb).square().mean() + 0.2 * (opacity - alpha).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def query(self, positions: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        x = positions.reshape(-1, 3)
        inside = (x.abs() <= self.half_extent).all(-1)
        t = times.reshape(-1, 1)
        canonical = x + self.deformation(x / self.half_extent, t)
        unit = (canonical / (2 * self.half_extent) + 0.5).clamp(0, 1)
        hidden = self.density_head(self.encoding(unit))
        density = nn.functional.softplus(hidden[:, 0]) * inside
        shape = positions.shape[:-1]
        return density.reshape(*shape, 1), torch.sigmoid(self.color_head(hidden[:, 1:])).reshape(*shape, 3)

    def render(self, origins: Tensor, directions: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        from nerfstudio.cameras.rays import RayBundle

        n = len(origins)
        bundle = RayBundle(
            origins, directions, torch.ones(n, 1), nears=torch.full((n, 1), 1.0), fars=torch.full((n, 1), 3.0)
        )
        coarse = self.uniform(bundle)
        spread = times[:, None].expand(n, self.SAMPLES, 1)
        density, _ = self.query(coarse.frustums.get_positions(), spread)
        samples = self.pdf(bundle, coarse, coarse.get_weights(density).detach())
        density, color = self.query(samples.frustums.get_positions(), spread)
        weights = samples.get_weights(density)
        opacity = weights.sum(1)
        return (weights * color).sum(1) + 1 - opacity, opacity[:, 0]

    @torch.no_grad()
    def picture(self, view: HeldOut, frame: int) -> np.ndarray:
        size = view.pictures.shape[1]
        axis = torch.arange(size) + 0.5
        xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        n = len(xy)
        camera = torch.from_numpy(view.c2w).float().expand(n, 4, 4)
        origins, directions = pixel_rays(xy, camera, torch.full((n,), view.focal), torch.full((n, 2), float(size)))
        times = torch.full((n, 1), float(view.times[frame]))
        self.eval()
        parts = zip(*(value.split(2048) for value in (origins, directions, times)), strict=True)
        made = torch.cat([self.render(*part)[0] for part in parts])
        self.train()
        return made.reshape(size, size, 3).numpy()


def fit(
    build: Ours | LiteralBuild, held_out: list[HeldOut], seconds: float, look_times: int = 6, judged_frames: int = 5
) -> dict[str, Any]:
    """Step for `seconds` (the time of looking at the result not counted) and note the PSNR on the way."""
    build.step(0)  # kernels are compiled or loaded
    spent, number, curve, looks = 0.0, 1, [], list(np.geomspace(max(seconds / 32, 2), seconds, look_times))
    frames = np.unique(np.linspace(0, len(held_out[0].times) - 1, judged_frames).round().astype(int))
    while spent < seconds:
        begun = now()
        build.step(number)
        spent, number = spent + now() - begun, number + 1
        if spent >= looks[0]:
            looks.pop(0)
            looks = looks or [np.inf]
            scores = [
                pooled_psnr(build.picture(view, frame), over_white(view.pictures[frame]) / 255.0)
                for view in held_out
                for frame in frames
            ]
            curve.append({"seconds": spent, "steps": number, "psnr": float(np.mean(scores))})
            print(f"{type(build).__name__}: {spent:.0f} s, {number} steps, {np.mean(scores):.2f} dB", flush=True)
    return {"seconds_per_step": spent / number, "samples_per_step": build.evaluated, "curve": curve}


def step_time(build: Ours, steps: int, rays: int) -> float:
    """Median seconds of a step of so many rays, at the end of the schedule: every frame in use.

    The steps are taken twice: the flow between two frames is followed when a step first asks for it, once in a run.
    """
    build.fit.sampler.config = replace(build.fit.sampler.config, rays=rays)
    for _ in range(2):
        times = []
        for number in range(build.total - steps, build.total):
            begun = now()
            build.step(number)
            times.append(now() - begun)
    return float(np.median(times))


def longer(grid: ViewGrid, frames: int) -> ViewGrid:
    """The same clip with its frames repeated."""
    pick = np.linspace(0, grid.num_frames - 1, frames).round().astype(int)
    return ViewGrid(grid.input_frames[pick], grid.novel_views[pick], grid.plan, fps=grid.fps)


# ------------------------------------------------------------------------------------------------------------ roofline


@dataclass(frozen=True)
class Part:
    """One part of a step: what it moves and computes per sample, and how long it took."""

    name: str
    bytes: float
    flops: float
    nanoseconds: float


def roofline(samples: int = 1 << 17) -> dict[str, Any]:
    """Measured nanoseconds per sample of each part, and the least that memory and matrix products would take.

    Bytes count every table entry, input and output once as if nothing were cached; so a part may beat its bound where
    the tables fit into the cache.
    """
    torch.manual_seed(0)
    bandwidth, gemm = copy_bandwidth(), gemm_rate()
    field = DeformableField(DeformableFieldConfig())
    x = (torch.rand(samples, 3) - 0.5) * 2 * field.config.half_extent
    t = torch.full((samples, 1), 0.5)
    levels, motion_levels = field.config.levels, len(field.config.motion_resolutions)
    unit = x / (2 * field.config.half_extent) + 0.5
    hidden, geometry = field.config.hidden_width, field.config.geometry_features
    features = torch.randn(samples, field.encoding.out_dim, requires_grad=True)
    density_flops = 2 * (features.shape[1] * hidden + hidden * (1 + geometry))
    color_flops = 2 * (geometry * hidden + hidden * 3)
    codes = torch.randn(samples, geometry, requires_grad=True)
    parts = []

    def measured(name: str, forward: Callable[[], Tensor], size: float, work: float, back: tuple[float, float]) -> None:
        ahead, behind = forward_and_backward(forward)
        parts.append(Part(f"{name}, forward", size, work, 1e9 * ahead / samples))
        parts.append(Part(f"{name}, backward", back[0], back[1], 1e9 * behind / samples))

    gather, columns = 8 * 2 * 4 * levels, 4 * field.encoding.out_dim
    measured(
        "hash grid",
        lambda: field.encoding(unit),
        12 + gather + columns,
        48 * levels,
        (12 + 2 * gather + columns, 40 * levels),
    )
    gather = 8 * 3 * 4 * motion_levels
    measured(
        "motion grid",
        lambda: field.deformation(x, t),
        24 + gather,
        56 * motion_levels,
        (24 + 2 * gather, 56 * motion_levels),
    )
    io = 4 * (features.shape[1] + 1 + geometry)
    measured("density head", lambda: field.density_head(features), io, density_flops, (2 * io, 2 * density_flops))
    io = 4 * (geometry + 3)
    measured("colour head", lambda: field.color_head(codes), io, color_flops, (2 * io, 2 * color_flops))
    rays = samples // 12 + 1
    distances = torch.rand(rays, 12).cumsum(1).flatten()[:samples]
    packed = RaySamples(torch.arange(samples) // 12, distances, 0.02, rays)
    density = (60 * torch.rand(samples)).requires_grad_()
    for backend, name in (("numba", ""), ("torch", " in torch")):
        measured(f"compositing{name}", lambda b=backend: composite(density, packed, b)[0], 24, 10, (24, 8))  # type: ignore[misc]
        measured(f"distortion{name}", lambda b=backend: spread(density, packed, b), 24, 40, (8, 1))  # type: ignore[misc]
    adam = torch.optim.Adam([field.encoding.table], fused=True)
    field.encoding.table.grad = torch.randn_like(field.encoding.table)
    numbers = field.encoding.table.numel()
    # per table entry, not per sample
    parts.append(Part("Adam on the hash grid, per entry", 28, 12, 1e9 * median_time(adam.step) / numbers))
    occupancy = OccupancyGrid(2)
    occupancy.density.zero_()
    origins = 2 * nn.functional.normalize(torch.randn(4096, 3), dim=-1)
    directions = nn.functional.normalize(torch.rand(4096, 3) - 0.5 - origins, dim=-1)
    walk = lambda: march(occupancy, origins, directions, torch.zeros(4096, 1), 0.0154, torch.full((4096,), 0.5))  # noqa: E731
    parts.append(Part("ray marching", 2 + 4 + 4, 12, 1e9 * median_time(walk) / len(walk().distances)))
    rows = [{**vars(p), "memory_ns": 1e9 * p.bytes / bandwidth, "gemm_ns": 1e9 * p.flops / gemm} for p in parts]
    return {"bandwidth_gb_s": bandwidth / 1e9, "gemm_gflops": gemm / 1e9, "parts": rows}


def median_time(action: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds; the first call is not counted."""
    action()
    times = []
    for _ in range(repeats):
        begun = now()
        action()
        times.append(now() - begun)
    return float(np.median(times))


def forward_and_backward(forward: Callable[[], Tensor]) -> tuple[float, float]:
    """Median seconds of each."""
    cotangent = torch.ones_like(forward())
    ahead, behind = [], []
    for _ in range(7):
        begun = now()
        out = forward()
        middle = now()
        out.backward(cotangent)
        ahead.append(middle - begun)
        behind.append(now() - middle)
    return float(np.median(ahead)), float(np.median(behind))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 128 MB."""
    source = torch.empty(32 << 20)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / median_time(lambda: target.copy_(source))


def gemm_rate() -> float:
    """Floating-point operations a second of a 1024 x 1024 float32 product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / median_time(lambda: a @ a)


# -------------------------------------------------------------------------------------------------------------- tables


def seconds_to(curve: list[dict[str, float]], psnr_db: float) -> float | None:
    """First time a curve is at least as high, interpolated in log time; None if it never is."""
    before = None
    for point in curve:
        if point["psnr"] >= psnr_db:
            if before is None:
                return point["seconds"]
            share = (psnr_db - before["psnr"]) / (point["psnr"] - before["psnr"])
            return float(before["seconds"] * (point["seconds"] / before["seconds"]) ** share)
        before = point
    return None


def tables(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| build | ms a step | samples a step | PSNR after | ... |", "|---|---|---|---|---|"]
    for name in ("ours", "literal"):
        if name in report:
            r = report[name]
            points = ", ".join(f"{p['psnr']:.1f} dB in {p['seconds']:.0f} s ({p['steps']} steps)" for p in r["curve"])
            lines.append(f"| {name} | {1e3 * r['seconds_per_step']:.0f} | {r['samples_per_step']} | {points} | |")
    if "literal" in report:
        end = report["literal"]["curve"][-1]
        reached = seconds_to(report["ours"]["curve"], end["psnr"])
        said = (
            "never reached"
            if reached is None
            else f"reached in {reached:.0f} s, {end['seconds'] / reached:.0f} times sooner"
        )
        lines += [
            "",
            f"The literal build's {end['psnr']:.1f} dB after {end['seconds']:.0f} s are {said} by ours.",
        ]
    for what in ("rays", "frames"):
        if what in report:
            lines += ["", f"| {what} | ms a step |", "|---|---|"]
            lines += [f"| {n} | {1e3 * s:.0f} |" for n, s in report[what].items()]
    if "peak_mb" in report:
        lines += ["", f"Peak memory of all of this, {max(report['frames'])} frames included: "
                  f"{report['peak_mb']:.0f} MB."]  # fmt: skip
    if "roofline" not in report:
        return "\n".join(lines) + "\n"
    r = report["roofline"]
    lines += ["", f"Copy bandwidth {r['bandwidth_gb_s']:.1f} GB/s, matrix products {r['gemm_gflops']:.0f} GFLOP/s."]
    lines += [
        "",
        "| part | bytes a sample | FLOP a sample | ns a sample | least by memory | least by products |",
        "|---|---|---|---|---|---|",
    ]
    for p in r["parts"]:
        needs = f"{p['bytes']:.0f} | {p['flops']:.0f}"
        lines.append(f"| {p['name']} | {needs} | {p['nanoseconds']:.1f} | {p['memory_ns']:.1f} | {p['gemm_ns']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(FieldBenchmark, description=__doc__).main()
