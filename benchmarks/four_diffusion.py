"""4Diffusion measured: what distillation and anchor add, how fast a step is, how much memory the released model takes.

    python benchmarks/four_diffusion.py targets --object 100
    python benchmarks/four_diffusion.py ablation --objects 3 --steps 200
    python benchmarks/four_diffusion.py speed
    python benchmarks/four_diffusion.py memory

`targets` says at which noise the model knows more than a field fitted to its own sampled views.
`ablation` fits held-out procedural creatures with the bundled model, every arm in the same number of steps. The first
half is the same for all: the sampled views. Then the views go on alone; or distillation and anchor take their place,
together or one of them; or the input video joins the views (what can be had without distillation).
`speed` compares one step with the same step as the reference's code words it.
`memory` runs the released model's networks on the meta device and adds up what is alive.
"""

import copy
import json
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import tyro
from literal_occupancy import SharedOccupancyGrid, reference_samples
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion_training.evaluate import as_floats, held_out_clip, motion_error, roughness
from sv4d_ns.distillation import losses, rendering
from sv4d_ns.distillation.cameras import DrawnViews
from sv4d_ns.distillation.objective import Objective, ObjectiveConfig, make_anchor
from sv4d_ns.distillation.priors import SV4DPrior
from sv4d_ns.distillation.rendering import Rays, RenderSettings, grid_rays, render
from sv4d_ns.distillation.schedules import own_weights
from sv4d_ns.distillation.warm_start import view_losses
from sv4d_ns.evaluation.protocols import PROTOCOLS
from sv4d_ns.evaluation.scores import Backbones, Pictures, picture_figures, video_figures
from sv4d_ns.field.compositing import RaySamples, accumulate, composite
from sv4d_ns.field.images import render_rgba
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField
from sv4d_ns.field.volume_rendering import render_rays
from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
from sv4d_ns.fitting.schedule import ScheduleConfig, Window
from sv4d_ns.fitting.train_views import hull_views, train_views
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.metrics.images import pooled_psnr
from sv4d_ns.plugin.distillation_model import field_config
from sv4d_ns.plugin.distillation_pipeline import WARM_START
from sv4d_ns.synthesis.base import to_model_space
from sv4d_ns.synthesis.choice import load_synthesizer
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.images import over_white
from sv4d_ns.views.grid import ViewGrid

FRAMES, SIZE = 8, 64
SAMPLED, WITH_INPUT = "sampled views alone", "sampled views and input video"
METHOD, NO_ANCHOR = "SDS + anchor", "SDS alone"
ARMS = (SAMPLED, METHOD, WITH_INPUT, NO_ANCHOR)
"""The second half of a run; the first is SAMPLED's."""
SHOWN = ("psnr", "ssim", "dssim_box", "iou", "sharpness", "motion", "hull", "input_psnr")


@dataclass(frozen=True)
class Case:
    """A held-out creature, what the model makes of its video, and the truth."""

    grid: ViewGrid
    truth: np.ndarray
    prior: SV4DPrior

    def pictures(self, made: np.ndarray) -> Pictures:
        """Some pictures of the novel views, beside the truth."""
        plan = self.grid.plan
        return Pictures(
            name="creature",
            made=made,
            truth=self.truth,
            view_names=tuple(f"{azimuth:g}" for azimuth in plan.azimuths_deg),
            azimuths_deg=np.asarray(plan.azimuths_deg),
            elevations_deg=np.asarray(plan.elevations_deg),
            times=np.linspace(0, 1, FRAMES),
            c2w=plan.c2w()[1:],
            focal_px=plan.focal_px(SIZE),
        )


def make_case(index: int, model: Path | None = None) -> Case:
    """The index-th held-out creature of the bundled model's evaluation, seen by that model or another one."""
    clip = held_out_clip(index, FRAMES, SIZE)
    synthesizer: Any = load_synthesizer("bundled", "cpu")[0]
    if model is not None:
        synthesizer.pipeline = StableVideo4D2Pipeline.from_pretrained(model)
    with tempfile.TemporaryDirectory() as store:
        views = synthesizer.generate(
            clip.inputs, clip.plan, seed=0, store=Path(store), progress=lambda done, total: None
        )
    grid = ViewGrid(clip.inputs, views.images, clip.plan, 8.0, views.confidence)
    return Case(grid, clip.views, sv4d_prior(synthesizer.pipeline, grid))


def sv4d_prior(pipeline: StableVideo4D2Pipeline, grid: ViewGrid) -> SV4DPrior:
    """The model that made a grid, ready to be asked about it."""
    plan = grid.plan
    return SV4DPrior(pipeline, grid.input_frames, plan.radius, plan.fov_deg, plan.input_elevation_deg)


@dataclass
class Fit:
    """A field in the making."""

    field: SpaceTimeField
    occupancy: OccupancyGrid
    optimizer: torch.optim.Optimizer


def new_fit(case: Case) -> Fit:
    """Untrained, bounded by the hull of the silhouettes of sampled views and input; the same for every arm."""
    torch.manual_seed(0)
    field, occupancy = SpaceTimeField(field_config(small=True)), OccupancyGrid(FRAMES)
    occupancy.carve(hull_views(train_views(case.grid, "cpu")))
    groups = [{"params": group, "lr": 1e-2 if name == "encoding" else 3e-3} for name, group in
              field.parameter_groups().items()]  # fmt: skip
    return Fit(field, occupancy, torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, fused=True))


def make_sampler(case: Case, arm: str) -> BatchSampler:
    """Pixels of the sampled views, for WITH_INPUT also of the input video."""
    views = train_views(case.grid, "cpu")
    with_input = arm == WITH_INPUT
    config = BatchConfig(rays=2048, patches=0, input_share=0.5 if with_input else 0.0)
    return BatchSampler(views if with_input else views[1:], config, ScheduleConfig(), 0)


def make_objective(case: Case, fit: Fit, arm: str, steps: int) -> Objective:
    """What `ns-train 4diffusion` asks on a CPU after its warm-up, or a part of it."""
    config = ObjectiveConfig(
        total_steps=steps,
        first_step=WARM_START,
        frames_per_step=4,
        weights=own_weights(short_run=True, perceptual=False),
        noise=case.prior.noise,
        render=RenderSettings(samples=128, normals=1024),
    )
    anchor = None if arm == NO_ANCHOR else make_anchor(case.grid, 0, SIZE, "cpu")
    return Objective(fit.field, fit.occupancy, case.prior, anchor, FRAMES, config)


def run_steps(case: Case, fit: Fit, arm: str, steps: range, total: int) -> None:
    """Some of the `total` steps of an arm."""
    objective = make_objective(case, fit, arm, len(steps)) if arm in (METHOD, NO_ANCHOR) else None
    sampler = make_sampler(case, arm)
    rates = [group.setdefault("initial_lr", group["lr"]) for group in fit.optimizer.param_groups]
    for step in steps:
        for group, rate in zip(fit.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay_factor(step, total, warmup_steps=0)
        if step % 2 == 0:
            fit.occupancy.update(fit.field, step // 2 % FRAMES)
        if objective is not None:
            terms = objective.terms(step - steps.start)
        else:
            batch = sampler.draw(step, Window.whole(FRAMES), 0)
            rendered = render_rays(
                fit.field,
                fit.occupancy,
                batch.origins,
                batch.directions,
                batch.times,
                128,
                background=batch.background,
                jitter=batch.jitter,
                moments=batch.moments,
            )
            terms = view_losses(rendered, batch)
        fit.optimizer.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
        fit.optimizer.step()


def fit_pictures(case: Case, fit: Fit, views: range) -> np.ndarray:
    """Renders of all frames at some of the grid's views (0 the input), [t, v, s, s, 4]."""
    c2w, focal = case.grid.plan.c2w(), case.grid.plan.focal_px(SIZE)
    return np.stack(
        [
            [render_rgba(fit.field, fit.occupancy, c2w[v], focal, SIZE, t / (FRAMES - 1)) for v in views]
            for t in range(FRAMES)
        ]
    )


def score(case: Case, made: np.ndarray, at_input: np.ndarray) -> dict[str, float]:
    """Means over the novel views, against the truth. `motion` and `sharpness` as in `training.evaluate.Scores`."""
    figures = {
        name: float(np.mean(values)) for name, values in picture_figures(case.pictures(made), Backbones()).items()
    }
    floats, truth = as_floats(made), as_floats(case.truth)
    figures["motion"] = motion_error(floats, truth)
    figures["sharpness"] = roughness(floats[..., :3]) / roughness(truth[..., :3])
    pairs = zip(at_input[:, 0], case.grid.input_frames, strict=True)
    figures["input_psnr"] = float(
        np.mean([pooled_psnr(over_white(a) / 255.0, over_white(b) / 255.0) for a, b in pairs])
    )
    return figures


@dataclass(frozen=True)
class Ablation:
    """What each part of the objective adds on held-out creatures."""

    objects: int = 3
    """Held-out creatures."""
    first: int = 0
    """Number of the first one."""
    steps: int = 200
    """Optimisation steps of every arm."""
    arms: tuple[str, ...] = ARMS
    """What to fit."""
    model: Path | None = None
    """Folder of another model than the bundled one, as `sv4d train` writes it."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("four_diffusion_ablation")
    """Where figures and pictures go, after every arm; what is there is not made again."""

    def main(self) -> None:
        """Run what is missing, then print the means."""
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        self.out.mkdir(parents=True, exist_ok=True)
        rows, videos = [], {arm: [] for arm in self.arms}
        for index in range(self.first, self.first + self.objects):
            case = make_case(index, self.model)
            half: Fit | None = None
            made = [case.truth, case.grid.novel_views]
            for arm in self.arms:
                path = self.out / f"{index:04d}_{arm.replace(' ', '_')}_{self.steps}.npz"
                if not path.is_file():
                    half = half or self._first_half(case)
                    pictures, seconds = self._second_half(case, half, arm)
                    with atomic_path(path) as temporary, temporary.open("wb") as file:
                        np.savez_compressed(file, pictures=pictures, seconds=seconds)
                kept = np.load(path)
                views = kept["pictures"][:, 1:]
                figures = score(case, views, kept["pictures"][:, :1])
                rows.append({"object": index, "arm": arm, "cpu_s": float(kept["seconds"]), **figures})
                made.append(views)
                videos[arm].append(case.pictures(views))
                print(index, arm, {name: round(figures[name], 4) for name in SHOWN}, flush=True)
            sheet = np.concatenate([np.concatenate(list(over_white(views[FRAMES // 2])), 1) for views in made])
            Image.fromarray(sheet).save(self.out / f"{index:04d}.png")
        with atomic_path(self.out / "figures.json") as path:
            path.write_text(json.dumps(rows, indent=1))
        self._summarise(rows, videos)

    def _first_half(self, case: Case) -> Fit:
        fit = new_fit(case)
        run_steps(case, fit, SAMPLED, range(self.steps // 2), self.steps)
        return fit

    def _second_half(self, case: Case, half: Fit, arm: str) -> tuple[np.ndarray, float]:
        fit = new_fit(case)
        fit.field.load_state_dict(half.field.state_dict())
        fit.occupancy.load_state_dict(half.occupancy.state_dict())
        fit.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
        began = time.process_time()
        run_steps(case, fit, arm, range(self.steps // 2, self.steps), self.steps)
        seconds = time.process_time() - began
        return fit_pictures(case, fit, range(case.grid.num_views + 1)), seconds

    def _summarise(self, rows: list[dict[str, Any]], videos: dict[str, list[Pictures]]) -> None:
        # so few objects make no distribution: squared distances of the features of paired videos
        protocol = replace(PROTOCOLS["benchmark"], fvd_of_each_video=True)
        print("| | " + " | ".join([*SHOWN, "rfd_4d", "cpu_s"]) + " |\n" + "|---" * (len(SHOWN) + 3) + "|")
        for arm in self.arms:
            mine = [row for row in rows if row["arm"] == arm]
            means = [f"{np.mean([row[name] for row in mine]):.3f}" for name in SHOWN]
            apart = video_figures(videos[arm], Backbones(), protocol)["rfd_4d"].value
            seconds = np.mean([row["cpu_s"] for row in mine])
            print(f"| {arm} | " + " | ".join([*means, f"{apart:.4f}", f"{seconds:.0f}"]) + " |")


# --------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Targets:
    """At which noise the model knows more than a field fitted to its sampled views: PSNR, SSIM and silhouette IoU of
    the field's renders at four orthogonal views, and of what the model sees behind them with noise."""

    object: int = 100
    """Held-out creature."""
    steps: int = 200
    """Of the field's fit to the sampled views."""
    draws: int = 8
    """Noises that are averaged, as distillation averages over its steps; one of them is shown alone, too."""
    levels: tuple[int, ...] = (100, 300, 600, 850, 900, 980)
    """Noise levels, of 1000."""
    model: Path | None = None
    """As for the ablation."""

    def main(self) -> None:
        """Print a row for each level."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        case = make_case(self.object, self.model)
        fit = new_fit(case)
        run_steps(case, fit, SAMPLED, range(self.steps), self.steps)
        frames, picked = list(range(0, FRAMES, 2)), list(range(0, case.grid.num_views, 2))
        renders = fit_pictures(case, fit, range(1, case.grid.num_views + 1))
        views = DrawnViews(
            tuple(case.grid.plan.azimuths_deg[view] for view in picked), case.grid.plan.input_elevation_deg
        )
        truth = case.truth[frames][:, picked]
        self._row("sampled views", case.grid.novel_views[frames][:, picked], truth)
        shown = renders[frames][:, picked]
        self._row("renders", shown, truth)
        latents = case.prior.encode(to_model_space(shown, 4).flatten(0, 1), torch.Generator())
        for level in self.levels:
            seen = [
                case.prior.target(latents, frames, views, level, torch.Generator().manual_seed(seed))
                for seed in range(self.draws)
            ]
            for name, target in (("one draw", seen[0]), (f"mean of {self.draws}", torch.stack(seen).mean(0))):
                self._row(f"noise {level}, {name}", self._decoded(case, target, truth.shape[:2]), truth)

    @torch.no_grad()
    def _decoded(self, case: Case, latents: Tensor, grid: tuple[int, int]) -> np.ndarray:
        vae = case.prior.pipeline.vae
        images = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1) / 2 + 0.5
        values = images.movedim(1, -1).unflatten(0, grid)
        alpha = values[..., 3:]
        straight = (values[..., :3] - (1 - alpha)) / alpha.clamp(min=1e-3)
        return (torch.cat([straight.clamp(0, 1), alpha], -1) * 255).round().byte().numpy()

    def _row(self, name: str, made: np.ndarray, truth: np.ndarray) -> None:
        from sv4d_ns.evaluation.scores import pair_figures

        figures = pair_figures(made.reshape(-1, *made.shape[2:]), truth.reshape(-1, *truth.shape[2:]), Backbones())
        print(name.ljust(26), *(f"{key} {figures[key].mean():.3f}" for key in ("psnr", "ssim", "iou")), flush=True)


# ----------------------------------------------------------------------------------------------------------- speed


def literal_terms(case: Case, field: SpaceTimeField, occupancy: SharedOccupancyGrid, step: int) -> dict[str, Tensor]:
    """A step as the reference's code words it: conditions are encoded again, 32 + 1 + 4 pictures rendered, normals
    taken at every sample of the last four."""
    prior = sv4d_prior(case.prior.pipeline, case.grid)
    anchor = make_anchor(case.grid, 0, SIZE, "cpu")
    config = ObjectiveConfig(total_steps=100, frames_per_step=FRAMES, render=RenderSettings(normals=0))
    objective = Objective(field, occupancy, prior, anchor, FRAMES, config)
    with mock.patch.object(rendering, "march", partial(reference_samples, field)):
        terms = objective.terms(step)
    plan = ViewPlan((0.0, 90.0, 180.0, 270.0), (0.0,) * 4, 0.0, prior.radius, prior.fov_deg)
    rays = grid_rays(plan, torch.tensor([0.5]), SIZE, "cpu")
    terms["orientation"] = 1000.0 * orientation_of_all(field, occupancy, rays)
    return terms


def orientation_of_all(field: SpaceTimeField, occupancy: SharedOccupancyGrid, rays: Rays) -> Tensor:
    """The orientation loss with a normal at every visible sample."""
    samples = occupancy.march(rays.origins, rays.directions, torch.full((len(rays),), 0.5))
    with torch.no_grad():
        index = samples.ray_indices
        x = rays.origins[index] + samples.distances[:, None] * rays.directions[index]
        keep = occupancy.visible(samples, field.density(x, rays.times[index]))
    samples = RaySamples(index[keep], samples.distances[keep], samples.step, samples.n_rays)
    x, index = x[keep], samples.ray_indices
    t = rays.times[index]
    weights = composite(field.density(x, t), samples)[0]
    opacity = accumulate(weights, torch.ones_like(weights)[:, None], samples)[:, 0]
    return losses.orientation(weights, field.normals(x, t), rays.directions[index], opacity)


@dataclass(frozen=True)
class Speed:
    """Steps per second of this package over those of the reference's formulation, same kernels, same field, at the
    final render size; and over the same with the encoding in plain torch."""

    repeats: int = 3
    """Steps of each, in turn."""
    warm_steps: int = 150
    """Steps that make an object first: an empty field would flatter both."""
    threads: int = 1
    """CPU threads."""

    def main(self) -> None:
        """Measure CPU time, which other processes on the machine do not change."""
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        case = make_case(0)
        made = new_fit(case)
        run_steps(case, made, WITH_INPUT, range(self.warm_steps), self.warm_steps)
        field, occupancy = made.field, made.occupancy
        shared = SharedOccupancyGrid(half_extent=field.config.half_extent)
        for step in range(0, 64, 16):
            shared.refresh(field, step)
        config = ObjectiveConfig(total_steps=100, frames_per_step=FRAMES, render=RenderSettings(samples=256))
        objective = Objective(field, occupancy, case.prior, make_anchor(case.grid, 0, SIZE, "cpu"), FRAMES, config)
        last = 90  # of 100: 64 x 64 renders, all terms on
        ways: dict[str, Callable[[], dict[str, Tensor]]] = {
            "ours": lambda: objective.terms(last),
            "literal": lambda: literal_terms(case, field, shared, last),
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.repeats + 1):
            for name, terms in ways.items():
                began = time.process_time()
                field.zero_grad()
                sum(terms().values(), torch.zeros(())).backward()
                spent[name].append(time.process_time() - began)
        ours, literal = (float(np.median(spent[name][1:])) for name in ("ours", "literal"))
        print(f"CPU seconds a step: ours {ours:.2f}, literal {literal:.2f}; steps per second {literal / ours:.2f} : 1")


# ---------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make and nobody has let go yet."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.alive += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.alive)
        return result


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a fused kernel leaves in memory: its output (on the meta device torch takes the unfused way)."""
    return query + 0 * value[..., :1, :1]


def parameter_bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Memory:
    """Computed memory of a 4D step with the released model: half-precision network, 32 renders of 256 x 256 pixels."""

    rays: int = 2048
    """Rays of the field that are really rendered; the rest is in proportion."""

    def main(self) -> None:
        """Print a table in GiB."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        from sv4d_ns.diffusion.fourdm.unet import FourDMUNet

        rows: dict[str, float] = {}
        half = torch.float16
        torch.nn.functional.scaled_dot_product_attention = fused_attention
        with torch.device("meta"):
            network = FourDMUNet().to(half).eval()
            rows["4DM, weights, float16"] = parameter_bytes(network)
            n = 80
            arguments = (torch.empty(n, 4, 32, 32, dtype=half), torch.zeros(n, dtype=torch.long),
                         torch.empty(n, 77, 1024, dtype=half), torch.empty(n, 16, 1024, dtype=half),
                         torch.empty(n, 16, dtype=half), 8, 5)  # fmt: skip
            with torch.no_grad(), LiveBytes() as live:
                network(*arguments)
            rows["4DM, features of its 80 images (no gradient)"] = live.peak
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
            ).to(half)
            rows["autoencoder, weights, float16"] = parameter_bytes(vae)
            for count in (8, 32):
                images = torch.empty(count, 3, 256, 256, dtype=half, requires_grad=True)
                with LiveBytes() as live:
                    vae.encode(images).latent_dist.mean.sum().backward()
                what = "as done here" if count == 8 else "all at once"
                rows[f"autoencoder, features of {count} renders with gradient ({what})"] = live.peak
        for name, value in rows.items():
            print(f"{name:75s} {value / 2**30:7.2f} GiB")
        self._field()

    def _field(self) -> None:
        torch.manual_seed(0)
        field = SpaceTimeField(field_config(small=False))
        field.space.backend = field.space_time.backend = "torch"  # what runs on a GPU
        total = parameter_bytes(field)
        print(f"{'field, weights, gradients and two moments, float32':75s} {4 * total / 2**30:7.2f} GiB")
        plan = ViewPlan((0.0, 90.0, 180.0, 270.0), (0.0,) * 4)
        rays = grid_rays(plan, torch.tensor([0.0]), 256, "cpu")
        pick = torch.randperm(len(rays))[: self.rays]
        part = type(rays)(rays.origins[pick], rays.directions[pick], rays.times[pick])
        with LiveBytes() as live:
            rendered = render(field, OccupancyGrid(1), part, RenderSettings(samples=128, normals=256), 0)
            (rendered.rgb.sum() + rendered.alpha.sum() + rendered.orientation).backward()
        per_ray = (live.peak - 2 * total) / self.rays
        for count, name in ((32 * 256 * 256, "all 32 renders at once"), (1 << 14, "a chunk of 16,384 rays")):
            print(
                f"{f'field, features with gradient of {name} (nothing skipped)':75s} {count * per_ray / 2**30:7.2f} GiB"
            )


Command = (
    Annotated[Targets, tyro.conf.subcommand("targets")]
    | Annotated[Ablation, tyro.conf.subcommand("ablation")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
)

if __name__ == "__main__":
    tyro.cli(Command).main()  # type: ignore[arg-type]
