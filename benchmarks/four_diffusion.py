"""4Diffusion measured: what distillation and anchor add, how fast a step is, how much memory the released model takes.

    python benchmarks/four_diffusion.py ablation --objects 4 --steps 400
    python benchmarks/four_diffusion.py speed
    python benchmarks/four_diffusion.py memory

`ablation` fits held-out procedural creatures with the embedded model in the same number of steps: from its sampled
views alone; the same with distillation and anchor added in the second half; and from the views and the input video.
`speed` compares one step with the same step as the reference's code words it.
`memory` runs the released model's networks on the meta device and adds up what is alive.
"""

import json
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sv4d_ns.cameras import ViewPlan
from sv4d_ns.fields.space_time import SpaceTimeField
from sv4d_ns.files import atomic_path
from sv4d_ns.fitting import BatchConfig, BatchSampler, hull_views, train_views
from sv4d_ns.four_diffusion import losses
from sv4d_ns.four_diffusion.model import field_config
from sv4d_ns.four_diffusion.objective import Objective, ObjectiveConfig, make_anchor
from sv4d_ns.four_diffusion.occupancy import SharedOccupancyGrid
from sv4d_ns.four_diffusion.pipeline import WARM_START
from sv4d_ns.four_diffusion.priors import SV4DPrior
from sv4d_ns.four_diffusion.rendering import Rays, RenderSettings, grid_rays, render
from sv4d_ns.four_diffusion.schedules import own_weights
from sv4d_ns.four_diffusion.warm_up import view_terms
from sv4d_ns.occupancy import OccupancyGrid
from sv4d_ns.rendering import RaySamples, accumulate, compositing_weights
from sv4d_ns.renders import psnr, render_rgba, silhouette_iou
from sv4d_ns.sampling import ScheduleConfig, Window
from sv4d_ns.schedulers import DecaySchedulerConfig, decay_factor
from sv4d_ns.synthesis import load_synthesizer
from sv4d_ns.training.evaluate import held_out_clip
from sv4d_ns.views import ViewGrid, over_white

FRAMES, SIZE = 8, 64
SAMPLED, WITH_INPUT = "sampled views", "sampled views and input video"
BOTH = "sampled views, then also SDS + anchor"
ARMS = (SAMPLED, BOTH, WITH_INPUT)


@dataclass(frozen=True)
class Case:
    """A held-out creature, what the embedded model makes of its video, and the truth."""

    grid: ViewGrid
    truth: np.ndarray
    prior: SV4DPrior


def make_case(index: int) -> Case:
    """The index-th held-out creature of the embedded model's evaluation."""
    plan = ViewPlan.EMBEDDED
    clip = held_out_clip(index, FRAMES, SIZE, plan)
    synthesizer: Any = load_synthesizer("embedded", "cpu")[0]
    with tempfile.TemporaryDirectory() as store:
        views = synthesizer.generate(clip.inputs, plan, seed=0, store=Path(store), progress=lambda done, total: None)
    grid = ViewGrid(clip.inputs, views.images, plan, 8.0, views.confidence)
    return Case(grid, clip.views, SV4DPrior(synthesizer.pipeline, clip.inputs, plan.radius, plan.fov_deg))


def new_field(case: Case) -> tuple[SpaceTimeField, OccupancyGrid, torch.optim.Optimizer]:
    """Untrained, bounded by the hull of the grid's silhouettes; the same for every arm."""
    torch.manual_seed(0)
    field, occupancy = SpaceTimeField(field_config(small=True)), OccupancyGrid(FRAMES)
    occupancy.carve(hull_views(train_views(case.grid, "cpu")))
    groups = [{"params": group, "lr": 1e-2 if name == "encoding" else 3e-3} for name, group in
              field.parameter_groups().items()]  # fmt: skip
    return field, occupancy, torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)


def fit(case: Case, arm: str, steps: int) -> tuple[SpaceTimeField, OccupancyGrid, float]:
    """One arm; returns the seconds it took, too."""
    field, occupancy, optimizer = new_field(case)
    views = train_views(case.grid, "cpu")
    batch = BatchConfig(rays=2048, patches=0, input_share=0.5 if arm == WITH_INPUT else 0.0)
    sampler = BatchSampler(views if arm == WITH_INPUT else views[1:], batch, ScheduleConfig(), 0)
    first = steps // 2 if arm == BOTH else steps
    config = ObjectiveConfig(
        total_steps=max(steps - first, 1),
        first_step=WARM_START,
        frames_per_step=4,
        weights=own_weights(short_run=True, perceptual=False),
        render=RenderSettings(samples=128, normals=1024),
    )
    anchor = make_anchor(case.grid, 0, SIZE, "cpu")
    objective = Objective(field, occupancy, case.prior, anchor, FRAMES, config)
    decay = DecaySchedulerConfig(warmup_steps=0, max_steps=steps)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay_factor(decay, step))
    began = time.monotonic()
    for step in range(steps):
        if step % 2 == 0:
            occupancy.update(field, step // 2 % FRAMES)
        terms, _ = view_terms(field, occupancy, sampler.draw(step, Window(0, FRAMES - 1), 0))
        if step >= first:
            terms |= objective.terms(step - first)
        optimizer.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
        optimizer.step()
        rates.step()
    return field, occupancy, time.monotonic() - began


def score(case: Case, field: SpaceTimeField, occupancy: OccupancyGrid) -> dict[str, float]:
    """Against the truth at the novel views (every second frame), and at the input view."""
    plan, frames = case.grid.plan, range(0, FRAMES, 2)
    c2w, focal = plan.c2w(), plan.focal_px(SIZE)

    def picture(view: int, frame: int) -> np.ndarray:
        return render_rgba(field, occupancy, c2w[view], focal, SIZE, frame / (FRAMES - 1))

    novel = [(picture(v + 1, t), case.truth[t, v]) for t in frames for v in range(plan.num_views)]
    known = [(picture(0, t), case.grid.input_frames[t]) for t in frames]

    def decibel(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        return float(np.mean([psnr(over_white(a) / 255.0, over_white(b) / 255.0) for a, b in pairs]))

    def structure(a: np.ndarray, b: np.ndarray) -> float:
        x, y = (torch.from_numpy(over_white(p)).float().movedim(-1, 0)[None] / 255 for p in (a, b))
        return losses.ssim(x, y).item()

    return {
        "novel_psnr": decibel(novel),
        "novel_ssim": float(np.mean([structure(a, b) for a, b in novel])),
        "novel_iou": float(np.mean([silhouette_iou(a[..., 3], b[..., 3]) for a, b in novel])),
        "input_psnr": decibel(known),
    }


@dataclass(frozen=True)
class Ablation:
    """What each part of the objective adds on held-out creatures."""

    objects: int = 4
    """Held-out creatures."""
    first: int = 0
    """Number of the first one."""
    steps: int = 400
    """Optimisation steps of every arm."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("four_diffusion_ablation.json")
    """Where the rows go, after every arm; rows that are there are not made again."""

    def main(self) -> None:
        """Run what is missing, then print the means."""
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        rows = json.loads(self.output.read_text()) if self.output.is_file() else []
        for index in range(self.first, self.first + self.objects):
            missing = [arm for arm in ARMS if not any((r["object"], r["arm"]) == (index, arm) for r in rows)]
            case = make_case(index) if missing else None
            for arm in missing:
                assert case is not None
                field, occupancy, seconds = fit(case, arm, self.steps)
                rows.append({"object": index, "arm": arm, **score(case, field, occupancy), "seconds": seconds})
                print(rows[-1], flush=True)
                with atomic_path(self.output) as path:
                    path.write_text(json.dumps(rows, indent=1))
        names = ("novel_psnr", "novel_ssim", "novel_iou", "input_psnr")
        for arm in ARMS:
            mine = [row for row in rows if row["arm"] == arm]
            means = ", ".join(f"{name} {np.mean([row[name] for row in mine]):.3f}" for name in names)
            print(f"{arm} ({len(mine)} objects): {means}")


# ----------------------------------------------------------------------------------------------------------- speed


def literal_terms(case: Case, field: SpaceTimeField, occupancy: SharedOccupancyGrid, step: int) -> dict[str, Tensor]:
    """A step as the reference's code words it: conditions are encoded again, 32 + 1 + 4 pictures rendered, normals
    taken at every sample of the last four."""
    prior = SV4DPrior(case.prior.pipeline, case.grid.input_frames, case.prior.radius, case.prior.fov_deg)
    anchor = make_anchor(case.grid, 0, SIZE, "cpu")
    config = ObjectiveConfig(total_steps=100, frames_per_step=FRAMES, render=RenderSettings(normals=0))
    terms = Objective(field, occupancy, prior, anchor, FRAMES, config).terms(step)
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
    weights = compositing_weights(field.density(x, t), samples)
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
        field, occupancy, _ = fit(case, WITH_INPUT, self.warm_steps)
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
    Annotated[Ablation, tyro.conf.subcommand("ablation")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
)

if __name__ == "__main__":
    tyro.cli(Command).main()  # type: ignore[arg-type]
